"""``gdetkd teach``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def teach(
    recipe: options.RecipeArgument,
    output: Annotated[
        Path,
        typer.Option("--output", metavar="KNOWLEDGE", help="Folder of the answers, new or of an earlier call."),
    ],
    int8: Annotated[
        bool, typer.Option("--int8", help="Store 8 bits per value instead of 16: half the size, a larger error.")
    ] = False,
    overrides: options.SetOption = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Run a recipe's teacher over the data once, and store its answers for any number of students.

    A recipe then uses them without the teacher's file: teacher: {arch: knowledge, path: KNOWLEDGE}.
    The same command continues after an interruption, and torchrun shares the work among processes.

    Example: gdetkd teach my.yaml --output runs/knowledge
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from gdetkd_cli.commands import run_teach

    perform(partial(run_teach, loaded, output=output, int8=int8), render.format_taught, as_json=as_json)
