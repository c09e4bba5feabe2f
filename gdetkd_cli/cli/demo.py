"""``gdetkd demo``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def demo(
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the students' weights and data order.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, max=10**9, help="Optimizer steps per student. Default: the recipe's steps."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="New folder for the image and both runs.")
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Try distillation on drawn images, in minutes.

    Trains a small student with and without a teacher, and compares the two.

    Example: gdetkd demo --output runs/demo
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_demo

    perform(partial(run_demo, seed=seed, steps=steps, output=output), render.format_demo, as_json=as_json)
