"""``gdetkd demo``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def demo(
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of both students' weights and data order.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Optimizer steps of each student. Default: the recipe's."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder for the image and the run folders.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """See distillation work on drawn images, in minutes.

    Trains a small student twice, with and without a teacher, and compares the two.
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_demo

    perform(partial(run_demo, seed=seed, steps=steps, output=output), render.demonstrated, as_json=as_json)
