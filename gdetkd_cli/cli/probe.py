"""``gdetkd probe``."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import partial
from pathlib import Path
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


class Channels(StrEnum):
    """Order of the channels that a model takes."""

    RGB = "rgb"
    BGR = "bgr"


class Layout(StrEnum):
    """Whether a model takes its channels first or last."""

    CHW = "chw"
    HWC = "hwc"


class Range(StrEnum):
    """Values of the images that a model takes."""

    UNIT = "0-1"
    BYTES = "0-255"


def probe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A run folder, a model file, a torchvision detector's name, or package.module:function.",
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW",
            help="Height and width of the probe image in pixels. Default: the model's own size, else 480x640.",
        ),
    ] = None,
    value_range: Annotated[
        Range | None, typer.Option("--range", help="Values that a model of unknown code takes. Default: 0-1.")
    ] = None,
    mean: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Subtracted from each channel, in that range.")
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None, typer.Option(help="Divided by, for each channel, after that.")
    ] = None,
    channels: Annotated[Channels, typer.Option(help="Their order in what it takes; bgr is OpenCV's.")] = Channels.RGB,
    layout: Annotated[
        Layout, typer.Option(help="Channels first or last; ONNX files and exported programs say it themselves.")
    ] = Layout.CHW,
    levels: Annotated[
        str | None,
        typer.Option("--levels", metavar="NAME,…", help="The levels, where you know better; names as shown here."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Image to look at the levels' values on.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw each level's activation over the image.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="OUT.yaml", help="Write a recipe with this model as the teacher."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the runners-up as well.")] = False,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Find and measure a detector's feature pyramid.

    Its levels fine to coarse, with channels, strides and offsets in pixels.
    """
    height_width = None if size is None else _height_width(size)

    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_probe, run_probe_to_recipe
    from gdetkd_cli.commands.probe import ProbeOptions

    how = ProbeOptions(
        size=height_width,
        scale=None if value_range is None else 255.0 if value_range == Range.BYTES else 1.0,
        mean=mean,
        std=std,
        bgr=channels == Channels.BGR,
        last=layout == Layout.HWC,
        levels=() if levels is None else tuple(name.strip() for name in levels.split(",")),
        image=image,
        plot=plot,
    )
    call = partial(run_probe, model, how) if recipe is None else partial(run_probe_to_recipe, model, how, recipe)
    perform(call, partial(render.probed, verbose=verbose), as_json=as_json)
