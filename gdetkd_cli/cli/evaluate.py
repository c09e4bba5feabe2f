"""``gdetkd eval``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def evaluate(
    target: options.TargetArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="A recipe whose data to use, or a folder with val.json (COCO) and images. Default: the run's own.",
        ),
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure a detector: COCO box metrics."""
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_data

    block = None if data is None else load_data(data)
    from gdetkd_cli.runs import run_eval

    perform(partial(run_eval, target, data=block), render.evaluated, as_json=as_json)
