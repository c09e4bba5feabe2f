"""``gdetkd data``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gdetkd_cli.cli import options

if TYPE_CHECKING:
    from gdetkd_cli.recipe.schema import Data


def data(
    source: Annotated[str, typer.Argument(metavar="DIR|RECIPE", help="Folder of images and annotations, or a recipe.")],
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image to write, with annotated training images. Default: data.png, or data-2.png and so on.",
        ),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Describe a data set: its format, counts by class and size, and every problem with its file.

    Reads annotations as training does, checks the header of every image, and draws a sheet of annotated images.

    Example: gdetkd data DIR
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.recipe.load import load_recipe

    block: Data | Path = Path(source) if Path(source).is_dir() else load_recipe(source).data
    from gdetkd_cli.commands import run_data

    perform(partial(run_data, source, data=block, sheet=sheet), render.format_data, as_json=as_json)
