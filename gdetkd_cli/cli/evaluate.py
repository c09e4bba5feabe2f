"""``gdetkd eval``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdetkd_cli.cli import options

if TYPE_CHECKING:
    from gdetkd_cli.recipe.schema import Data


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FILE|RECIPE", help="Run folder, detector file, or recipe (evaluates the recipe's teacher)."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Recipe or data folder. The folder holds val.json (COCO) and images/, or any layout that `gdetkd "
            "init` reads. Default: the run's own data.",
        ),
    ] = None,
    classes: options.ClassesOption = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Evaluate a detector with COCO box metrics.

    Example: gdetkd eval runs/student
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_data

    block: Data | Path | None = None
    if data is not None:
        folder = Path(data)
        block = folder if folder.is_dir() and not (folder / "val.json").is_file() else load_data(data)
    from gdetkd_cli.commands import run_eval

    names = options.split_names(classes)
    perform(partial(run_eval, target, data=block, classes=names), render.format_evaluation, as_json=as_json)
