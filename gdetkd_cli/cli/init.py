"""``gdetkd init``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def init(
    teacher: Annotated[
        str,
        typer.Option(
            metavar="T", help="Run folder, model file, torchvision detector name, or package.module:function."
        ),
    ],
    student: Annotated[
        str, typer.Option(metavar="S", help="As --teacher, or BACKBONE+HEAD, for example resnet18+retinanet.")
    ],
    data: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of images with COCO, YOLO, VOC or BDD100K annotations, or with none."),
    ],
    classes: options.ClassesOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Recipe to write.")] = Path("recipe.yaml"),
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write a recipe for a teacher, a student and a folder of data.

    Probes both detectors, finds the data files, and chooses terms, sizes and steps. You can run the recipe as written.

    Example: gdetkd init --teacher teacher.pt --student resnet18+fcos --data DIR
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_init

    names = options.split_names(classes)
    work = partial(run_init, teacher, student, data, output=output, classes=names)
    perform(work, render.format_check, as_json=as_json)
