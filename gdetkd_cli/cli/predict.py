"""``gdetkd predict``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN|FILE|RECIPE", help="Run folder, detector file, or recipe (runs its teacher)."),
    ],
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES…", help="Image files, videos, folders, or patterns such as 'images/*.jpg'."),
    ],
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the images with their boxes; new or empty.")
    ] = None,
    coco: Annotated[
        Path | None, typer.Option(metavar="FILE", help="COCO file to write, with a score per annotation.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Table to write, with a row per detection.")] = None,
    yolo: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for YOLO's text files, with scores; new or empty.")
    ] = None,
    min_score: Annotated[float, typer.Option(metavar="S", min=0, max=1, help="Lowest score to keep.")] = 0.3,
    only: Annotated[str | None, typer.Option(metavar="NAME,…", help="Classes to keep. Default: all.")] = None,
    classes: options.ClassesOption = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Run a detector on images and videos.

    Example: gdetkd predict runs/mine photos --save drawn
    """
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.cli.render_predictions import format_predictions
    from gdetkd_cli.commands import run_predict
    from gdetkd_cli.commands.predict import PredictOptions

    chosen = PredictOptions(
        min_score=min_score,
        only=options.split_names(only),
        classes=options.split_names(classes),
        save=save,
        coco=coco,
        csv=csv,
        yolo=yolo,
    )
    perform(partial(run_predict, model, images, chosen), format_predictions, as_json=as_json)
