"""``gdetkd compare``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options
from gdetkd_cli.errors import ComparisonError

MethodsOption = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="A,B,C",
        help="none (plain training), gdetkd (the recipe as it is), or terms joined by +, as in sgfi+ckd+head. "
        "Default: every method alone; where gdetkd copies the teacher's head, also every method with that head.",
    ),
]
FoldsOption = Annotated[
    int | None,
    typer.Option(
        "--folds",
        metavar="K",
        min=2,
        help="Cross-validate: divide the training and validation images into K folds, run each method on each "
        "fold, and pool the detections.",
    ),
]


def compare(
    recipe: options.RecipeArgument,
    methods: MethodsOption = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", metavar="N,M", help="Budgets in optimizer steps. Default: the recipe's steps."),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Seeds per method. A single seed gives no interval.")
    ] = 3,
    folds: FoldsOption = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials to run at the same time.")] = 1,
    baseline: Annotated[
        str, typer.Option("--baseline", metavar="METHOD", help="Method to compare the others with.")
    ] = "none",
    overrides: options.SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="Folder for the trials and the table. An existing one is continued."
        ),
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods on one student: a table with intervals.

    Finished trials are skipped and interrupted ones resume, so you can stop, continue and extend a comparison.

    The 95 % interval of a difference covers seeds and validation images together; with --folds, it covers folds.
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    budgets = _parse_budgets(steps)
    from gdetkd_cli.commands import run_compare

    names = tuple(name.strip() for name in methods.split(",")) if methods else ()
    work = partial(run_compare, loaded, methods=names, steps=budgets, seeds=seeds, folds=folds, baseline=baseline)
    result = perform(partial(work, jobs=jobs, output=output), render.format_comparison, as_json=as_json)
    if result is not None and result.failures:
        count = len(result.failures)
        raise ComparisonError(f"{count} trial{'s' * (count > 1)} failed; the first: {result.failures[0]}")


def _parse_budgets(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise options.UsageError(f"--steps: expected whole numbers joined by commas, as in 500,8000; got {text!r}")
    return tuple(map(int, words))
