"""Options and checks that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.trust import trust_code

if TYPE_CHECKING:
    from gdetkd_cli.recipe.schema import Recipe


def _trust(given: bool) -> bool:
    """Applies to the whole process."""
    trust_code(given)
    return given


_RECIPE_HELP = "Recipe file (YAML), or a name from: gdetkd recipe list."
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP)]
OptionalRecipe = Annotated[str | None, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP)]
RecipeOption = Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="As RECIPE.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Change a field of the recipe, as in --set train.steps=500. Repeatable."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="New run folder. Default: runs/NAME, after the recipe."),
]
NoMeasureOption = Annotated[
    bool,
    typer.Option("--no-measure", help="Do not measure the trained student for a report, which takes up to a minute."),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="RUN|auto",
        help="Run folder to continue, with its own recipe. With auto: continue the run in --output, or start it; for "
        "jobs that a scheduler starts again.",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", min=1, max=10**9, help="With --resume RUN: train on, to N steps in all."),
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="With --resume RUN: continue even if the recipe or the data changed meanwhile."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trust,
        help="Allow gdetkd to run your own code: the Python functions that `factory` fields name.",
    ),
]


def _parse_classes(text: str | None) -> str | None:
    """Checks that the names are distinct and not empty."""
    names = split_names(text)
    if text is not None and (not all(names) or len(set(names)) < len(names)):
        raise typer.BadParameter(
            f"expected distinct class names with commas between them, for example cat,dog; got {text[:80]!r}",
            param_hint="--classes",
        )
    return text


def split_names(text: str | None) -> tuple[str, ...]:
    """Returns the names of a comma-separated list without the spaces around them; empty for None."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="NAME,…",
        callback=_parse_classes,
        help="Names of the model's classes in the order of its labels, for a file that does not name them.",
    ),
]
TargetArgument = Annotated[str, typer.Argument(metavar="RUN|FILE", help="Run folder or detector file.")]


class UsageError(GDetKDError):
    """An option is missing, invalid, or excluded by another one."""

    exit_code = 2


def choose_recipe(argument: str | None, option: str | None) -> str | None:
    """Returns the recipe that was named with or without ``--recipe``.

    Raises:
        UsageError: two recipes were named.
    """
    if argument and option:
        raise UsageError(f"two recipes given, {argument} and --recipe {option}; remove one")
    return argument or option


def load_required_recipe(recipe: str | None, overrides: list[str] | None) -> Recipe:
    """Loads the recipe of a command without ``--resume``.

    Call it before you import ``gdetkd_cli.commands``: torch takes seconds to load, and recipe errors should not wait.

    Raises:
        UsageError: there is no recipe.
        RecipeError: the recipe is not usable.
    """
    if recipe is None:
        raise UsageError("no recipe given; name a RECIPE to start a run, or add --resume RUN to continue one")
    from gdetkd_cli.recipe.load import load_recipe

    return load_recipe(recipe, overrides or ())


def plan_resume(
    resume: str | None, *, steps: int | None, force: bool, others: Mapping[str, object]
) -> dict[str, Any] | None:
    """The arguments of ``resume_run``; None if the command starts from a recipe.

    Args:
        others: values of the options that start from a recipe, by name.

    Raises:
        UsageError: options exclude each other.
    """
    if resume is None or resume == "auto":
        if steps is not None:
            raise UsageError("--steps needs --resume RUN; for a new run, use --set train.steps=N")
        if force:
            raise UsageError("--force needs --resume RUN; a run that changed cannot be continued by --resume auto")
        return None
    check_alone("--resume", others)
    return {"run": Path(resume), "steps": steps, "force": force}


def check_alone(option: str, others: Mapping[str, object]) -> None:
    """Checks that no option excluded by ``option`` was given.

    Args:
        others: values of the excluded options by name; None, False and an empty list count as not given.

    Raises:
        UsageError: one of the others was given.
    """
    given = [name for name, value in others.items() if value]
    if given:
        raise UsageError(f"{option} cannot be combined with {', '.join(given)}; remove one or the other")
