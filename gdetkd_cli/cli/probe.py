"""``gdetkd probe``."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from gdetkd_cli.cli import options


def _parse_size(text: str) -> tuple[int, int]:
    """Parses ``480x640`` as (height, width) pixels."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})[xX]([1-9][0-9]{0,4})", text)
    if match is None:
        raise typer.BadParameter(
            f"expected height x width in pixels, for example 480x640; got {text[:80]}", param_hint="--size"
        )
    return int(match[1]), int(match[2])


def _check_triple(values: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    """Checks that the numbers are finite."""
    if values is not None and not all(map(math.isfinite, values)):
        raise typer.BadParameter(f"expected three finite numbers; got {values}")
    return values


def _check_std(values: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
    if values is not None and not all(value > 0 for value in values):
        raise typer.BadParameter(f"expected three numbers above 0, by which images are divided; got {values}")
    return _check_triple(values)


_Triple = tuple[float, float, float]
_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Run folder, model file, torchvision detector name, or package.module:function."
    ),
]
_Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="HxW",
        help="Height and width of the probe image in pixels. Default: the model's fixed size, else 480x640.",
    ),
]
_Range = Annotated[
    Literal["0-1", "0-255"] | None,
    typer.Option("--range", help="Pixel values that a custom model expects. Default: 0-1."),
]
_Mean = Annotated[
    _Triple | None,
    typer.Option("--mean", callback=_check_triple, help="Mean per channel that a custom model subtracts."),
]
_Std = Annotated[
    _Triple | None,
    typer.Option("--std", callback=_check_std, help="Standard deviation per channel that a custom model divides by."),
]
_Channels = Annotated[
    Literal["rgb", "bgr"], typer.Option("--channels", help="Channel order that a custom model expects.")
]
_Layout = Annotated[
    Literal["chw", "hwc"],
    typer.Option(
        "--layout", help="Whether a custom model expects channels first or last. Ignored for files that define it."
    ),
]
_Levels = Annotated[
    str | None,
    typer.Option("--levels", metavar="NAME,…", help="Names of the levels to use instead of those found."),
]
_Image = Annotated[Path | None, typer.Option("--image", metavar="FILE", help="Image on which to measure the levels.")]
_Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw each level's activation over the image.")
]
_Recipe = Annotated[
    Path | None, typer.Option("--recipe", metavar="OUT.yaml", help="Write a recipe with this model as the teacher.")
]


def probe(
    model: _Model,
    size: _Size = None,
    value_range: _Range = None,
    mean: _Mean = None,
    std: _Std = None,
    channels: _Channels = "rgb",
    layout: _Layout = "chw",
    levels: _Levels = None,
    classes: options.ClassesOption = None,
    image: _Image = None,
    plot: _Plot = None,
    recipe: _Recipe = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also show the other sets of levels considered.")] = False,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Find and measure a detector's feature pyramid.

    Lists the levels from fine to coarse, with their channels, strides and offsets in pixels.

    Example: gdetkd probe teacher.pt --image street.jpg --plot levels.png
    """
    height_width = None if size is None else _parse_size(size)

    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_probe, run_probe_to_recipe
    from gdetkd_cli.commands.probe import ProbeOptions

    probe_options = ProbeOptions(
        size=height_width,
        scale=None if value_range is None else 255.0 if value_range == "0-255" else 1.0,
        mean=mean,
        std=std,
        bgr=channels == "bgr",
        last=layout == "hwc",
        levels=options.split_names(levels),
        classes=options.split_names(classes),
        image=image,
        plot=plot,
    )
    if recipe is None:
        work = partial(run_probe, model, probe_options)
    else:
        work = partial(run_probe_to_recipe, model, probe_options, recipe)
    perform(work, partial(render.format_pyramid, verbose=verbose), as_json=as_json)
