"""The application: its commands, and how it reports errors."""

from __future__ import annotations

import json
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from gdetkd_cli import __version__
from gdetkd_cli.cli.advise import advise
from gdetkd_cli.cli.bench import bench
from gdetkd_cli.cli.compare import compare
from gdetkd_cli.cli.data import data
from gdetkd_cli.cli.demo import demo
from gdetkd_cli.cli.distill import distill
from gdetkd_cli.cli.evaluate import evaluate
from gdetkd_cli.cli.export import export
from gdetkd_cli.cli.init import init
from gdetkd_cli.cli.predict import predict
from gdetkd_cli.cli.probe import probe
from gdetkd_cli.cli.recipe import app as recipe_app
from gdetkd_cli.cli.report import report
from gdetkd_cli.cli.teach import teach
from gdetkd_cli.cli.train import train
from gdetkd_cli.cli.watch import watch
from gdetkd_cli.errors import ComparisonError, GDetKDError
from gdetkd_cli.files import FULL
from gdetkd_cli.memory import describe_exhaustion
from gdetkd_cli.text import show_hidden

_INTERRUPTED = 130
_INTERNAL_ERROR = 70
_PREFIX = "Error: "
_show = partial(show_hidden, keep="\n")


class _ErrorBoundary(TyperGroup):
    """The one place where an exception becomes a line on stderr, a JSON document on stdout, and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: the type that typer declares is private
        """Notes whether the command was asked for JSON, before an argument can be refused."""
        ctx.meta["gdetkd.json"] = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:  # in an option before the command
            _print_usage_error(ctx, error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Runs the parsed command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise  # Typer handles these: --help, a closed stdout.
        except TyperException as error:  # a mistake in the command line, which Typer explains
            _print_usage_error(ctx, error)
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params["debug"]:
                typer.echo(_show("".join(traceback.format_exception(error))), err=True)
            message, code = describe_error(error)
            typer.echo(_colour(message), err=True)
            if ctx.meta["gdetkd.json"] and not isinstance(error, ComparisonError):  # its result is on stdout already
                _print_error(type(error).__name__, message.removeprefix(_PREFIX), code)
            raise typer.Exit(code) from error


def _print_usage_error(ctx: Any, error: TyperException) -> None:
    if ctx.meta["gdetkd.json"]:
        _print_error("UsageError", error.format_message(), error.exit_code)


def _print_error(kind: str, message: str, code: int) -> None:
    """Prints an error as a JSON document, in the first of several processes."""
    from gdetkd_cli.cli.terminal import is_first_process  # imports rich, which is slow

    if is_first_process():
        error = {"type": kind, "message": message, "exit_code": code}
        with suppress(OSError):  # stdout may be what cannot be written; stderr has the message
            typer.echo(json.dumps({"schema": 1, "error": error}, indent=2))


def _colour(message: str) -> str:
    if not message.startswith(_PREFIX):
        return message
    return typer.style(_PREFIX.strip(), fg=typer.colors.RED, bold=True) + message.removeprefix(_PREFIX.strip())


def describe_error(error: BaseException) -> tuple[str, int]:
    """Returns the message for the user and the exit code."""
    notes = getattr(error, "__notes__", ())
    match error:
        case GDetKDError():
            return f"{_PREFIX}{_show('; '.join([str(error), *notes]))}", error.exit_code
        case KeyboardInterrupt():
            # Interrupted functions add a note on how to continue.
            return _show("; ".join([str(error) or "interrupted", *notes])), getattr(error, "exit_code", _INTERRUPTED)
        case OSError(filename=str() | Path() as path, strerror=str() as reason):
            return f"{_PREFIX}{_show(f'{path}: {reason}')}", 1
        case OSError(errno=number, strerror=reason) if number in FULL:  # of a write, which names no file
            return f"{_PREFIX}a file could not be written ({reason}); free some space, then run the command again", 1
        case _ if (exhausted := describe_exhaustion(error)) is not None:
            return "; ".join([f"{_PREFIX}{exhausted}", *getattr(error, "__notes__", ())]), 1
        case _:
            problem = _show(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return f"internal error: {problem}; run `gdetkd --debug ...` to see the traceback", _INTERNAL_ERROR


app = typer.Typer(
    cls=_ErrorBoundary,
    name="gdetkd",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"gdetkd {__version__}")
        raise typer.Exit


_START = """\
gdetkd trains a small object detector with your large one as its teacher.

See it work on drawn images, in minutes:
  gdetkd demo

Write a recipe for your own teacher, student and data, then run it:
  gdetkd init --teacher teacher.pt --student resnet18+fcos --data DIR
  gdetkd distill recipe.yaml

All commands: gdetkd --help
"""


@app.callback()
def _set_global_options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="GDETKD_DEBUG", help="Show the traceback when a command fails.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distill large object detectors into small ones with G-DetKD.

    To see an example, run: gdetkd demo. To use your own images, run: gdetkd init.
    """
    if context.invoked_subcommand is None:
        typer.echo(_START, nl=False)


app.command("demo")(demo)
app.command("init")(init)
app.command("data")(data)
app.command("probe")(probe)
app.command("advise")(advise)
app.command("train")(train)
app.command("teach")(teach)
app.command("distill")(distill)
app.command("eval")(evaluate)
app.command("predict")(predict)
app.command("export")(export)
app.command("compare")(compare)
app.command("report")(report)
app.command("watch")(watch)
app.command("bench")(bench)
app.add_typer(recipe_app, name="recipe")


def main() -> None:
    """Runs ``gdetkd``."""
    app(prog_name="gdetkd")
