"""The options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.trust import trust_code

if TYPE_CHECKING:
    from gdetkd_cli.recipe.schema import Recipe


def _trust(given: bool) -> bool:
    """Consent holds for the process."""
    trust_code(given)
    return given


RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="Recipe file (YAML), or a name from: gdetkd recipe list."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a field of the recipe, as in --set train.steps=500. Repeatable."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Run folder to write. Default: a new one named after the recipe."),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option("--resume", metavar="RUN", help="Continue this run folder; its own recipe is used."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trust,
        help="Run the Python function that a factory names; without it no code of yours is run.",
    ),
]
TargetArgument = Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run folder, or a detector file.")]


class UsageError(GDetKDError):
    """The options given do not make a command: one is missing, or two exclude each other."""

    exit_code = 2


def recipe_to_start(recipe: str | None, overrides: list[str] | None) -> Recipe:
    """The recipe of a command that was not given ``--resume``.

    Call it before ``gdetkd_cli.commands`` is imported: torch takes seconds to load, a mistake in a recipe none to show.

    Raises:
        UsageError: there is no ``--recipe``.
        RecipeError: the recipe is not usable.
    """
    if recipe is None:
        raise UsageError("give --recipe RECIPE to start a run, or --resume RUN to continue one")
    from gdetkd_cli.recipe.load import load_recipe

    return load_recipe(recipe, overrides or ())


def alone(option: str, others: dict[str, object]) -> None:
    """Refuses options beside one that excludes them.

    Args:
        option: the one that was given.
        others: values of the excluded options by name; None, False and an empty list count as not given.

    Raises:
        UsageError: one of the others was given.
    """
    given = [name for name, value in others.items() if value]
    if given:
        raise UsageError(f"{option} excludes {', '.join(given)}; leave out one side")
