"""``gdetkd bench``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def bench(
    recipe: options.RecipeArgument,
    steps: Annotated[int, typer.Option("--steps", min=1, max=10**9, help="Steps to time after a warm-up.")] = 20,
    overrides: options.SetOption = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure where a step's time goes, its memory and its cost.

    Example: gdetkd bench my.yaml --steps 50
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from gdetkd_cli.commands import profile_distill

    perform(partial(profile_distill, loaded, steps=steps), render.format_profile, as_json=as_json)
