"""``gdetkd compare``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options
from gdetkd_cli.errors import ComparisonError


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), or a built-in recipe's name.")],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B,C",
            help="none (plain training), gdetkd (the recipe as it is), or terms joined by +, as in sgfi+ckd+head. "
            "Default: all methods, each alone, and each with the teacher's head where gdetkd has it.",
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N,M", help="Budgets of optimizer steps. Default: the recipe's.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each method; one has no interval.")] = 3,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            metavar="K",
            min=2,
            help="Divide training and validation images together into K folds; run each method on each fold, and pool "
            "the detections.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at the same time.")] = 1,
    baseline: Annotated[
        str, typer.Option("--baseline", metavar="METHOD", help="The method that the others' differences are to.")
    ] = "none",
    overrides: options.SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Folder of runs and table. One that exists is continued."),
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train one student with several methods, and write a table.

    A run that is finished is not run again, so a table can grow, and be stopped and continued at any time.

    The 95 % interval of a difference covers seeds and validation images together; with --folds, it is over folds.
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    budgets = _budgets(steps)
    from gdetkd_cli.commands import run_compare

    asked = tuple(name.strip() for name in methods.split(",")) if methods else ()
    table = partial(run_compare, loaded, methods=asked, steps=budgets, seeds=seeds, folds=folds, baseline=baseline)
    found = perform(partial(table, jobs=jobs, output=output), render.compared, as_json=as_json)
    if found is not None and found.failures:
        raise ComparisonError(f"{len(found.failures)} runs did not finish, the first: {found.failures[0]}")


def _budgets(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise options.UsageError(f"--steps wants whole numbers joined by commas, as in 500,8000; got {text!r}")
    return tuple(map(int, words))
