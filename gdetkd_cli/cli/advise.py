"""``gdetkd advise``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def advise(
    recipe: options.RecipeArgument,
    share: Annotated[
        float, typer.Option("--share", min=0.001, max=1.0, help="Share of the recipe's steps that each run takes.")
    ] = 0.1,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B",
            help="Methods to try beside plain training, as in compare. Default: gdetkd,roi_imitation.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Seeds per method.")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=1000, help="Runs at the same time.")] = 1,
    overrides: options.SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder for the runs. An existing one is continued."),
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Answer whether distillation will help on your data, from short runs.

    Trains the student plain and with the two methods that lead most tables, each for a tenth of the recipe's steps, and
    says what to expect of the whole budget.

    Example: gdetkd advise my.yaml
    """
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.cli.render_comparison import format_advice
    from gdetkd_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from gdetkd_cli.commands import run_advise

    work = partial(run_advise, loaded, share=share, seeds=seeds, jobs=jobs, output=output)
    if methods:
        work = partial(work, methods=tuple(name.strip() for name in methods.split(",")))
    perform(work, format_advice, as_json=as_json)
