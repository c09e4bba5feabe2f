"""``gdetkd probe``."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def _height_width(text: str) -> tuple[int, int]:
    """``480x640`` as (height, width) pixels."""
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(
            f"expected height x width in pixels, for example 480x640; got {text}", param_hint="--size"
        )
    return int(match[1]), int(match[2])


def probe(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run folder, a detector file, or a torchvision detector's name.")
    ],
    size: Annotated[
        str, typer.Option("--size", metavar="HxW", help="Height and width of the probe image in pixels.")
    ] = "480x640",
    as_json: options.JsonOption = False,
) -> None:
    """Show a detector's feature pyramid, as measured.

    Its levels fine to coarse, with channels, strides and offsets in pixels.
    """
    height_width = _height_width(size)

    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.runs import run_probe

    perform(partial(run_probe, model, size=height_width), render.probed, as_json=as_json)
