"""``gdetkd compare``."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

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


BaselineOption = Annotated[str, typer.Option("--baseline", metavar="METHOD", help="Method to compare the others with.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Folder for the trials and the table. An existing one is continued."),
]
LauncherOption = Annotated[
    Literal["slurm", "local"] | None,
    typer.Option(
        "--launcher",
        help="Run each trial as a job that can be requeued: with slurm, or with local for a try on this machine. Needs "
        "pip install '.[slurm]'.",
    ),
]
LauncherSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set-launcher",
        metavar="NAME=VALUE",
        help="What each job asks of the scheduler, as in --set-launcher partition=gpu --set-launcher gpus_per_node=1. "
        "Repeatable.",
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
        int, typer.Option("--seeds", min=1, max=1000, help="Seeds per method. A single seed gives no interval.")
    ] = 3,
    folds: FoldsOption = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=1000, help="Trials to run at the same time.")] = 1,
    baseline: BaselineOption = "none",
    overrides: options.SetOption = None,
    output: OutputOption = None,
    launcher: LauncherOption = None,
    launcher_settings: LauncherSettings = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods on one student: a table with intervals.

    Finished trials are skipped and interrupted ones resume, so you can stop, continue and extend a comparison.

    The 95 % interval of a difference covers seeds and validation images together; with --folds, it covers folds.

    Example: gdetkd compare my.yaml --methods none,gdetkd --seeds 3
    """
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.cli.render_comparison import format_comparison
    from gdetkd_cli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    budgets = _parse_budgets(steps)
    settings = _parse_launcher_settings(launcher, launcher_settings or [])
    from gdetkd_cli.commands import run_compare
    from gdetkd_cli.compare.cluster import Launcher

    chosen = None if launcher is None else Launcher(launcher, settings)
    names = tuple(name.strip() for name in methods.split(",")) if methods else ()
    work = partial(run_compare, loaded, methods=names, steps=budgets, seeds=seeds, folds=folds, baseline=baseline)
    work = partial(work, jobs=jobs, output=output, launcher=chosen)
    result = perform(work, format_comparison, as_json=as_json)
    if result is not None and result.failures:
        count = len(result.failures)
        raise ComparisonError(f"{count} trial{'s' * (count > 1)} failed; the first: {result.failures[0]}")


def _parse_budgets(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in words):
        raise options.UsageError(f"--steps: expected whole numbers joined by commas, as in 500,8000; got {text!r:.80}")
    return tuple(map(int, words))


def _parse_launcher_settings(launcher: str | None, texts: list[str]) -> dict[str, object]:
    from gdetkd_cli import yaml_text

    if texts and launcher is None:
        raise options.UsageError("--set-launcher needs --launcher slurm or --launcher local")
    settings: dict[str, object] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name.isidentifier() and sign):
            raise options.UsageError(f"--set-launcher {text}: expected NAME=VALUE, as in partition=gpu")
        try:
            settings[name], _ = yaml_text.parse(value)
        except yaml_text.YamlError as error:
            raise options.UsageError(f"--set-launcher {text}: the value is not valid YAML: {error}") from error
    return settings
