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
        str, typer.Argument(metavar="RUN|FILE|RECIPE", help="A run folder, a detector file, or a recipe's teacher.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="A recipe whose data to use, or a folder: val.json (COCO) and images, or what init finds. Default: "
            "the run's own.",
        ),
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure a detector: COCO box metrics."""
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_data

    block: Data | Path | None = None
    if data is not None:
        folder = Path(data)
        block = folder if folder.is_dir() and not (folder / "val.json").is_file() else load_data(data)
    from gdetkd_cli.commands import run_eval

    perform(partial(run_eval, target, data=block), render.evaluated, as_json=as_json)
