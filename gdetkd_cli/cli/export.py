"""``gdetkd export``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def export(
    target: options.TargetArgument,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file.")] = False,
    torchscript: Annotated[bool, typer.Option("--torchscript", help="Write a TorchScript file.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="File or folder. Default: beside the detector.")
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Export a trained student to ONNX or TorchScript.

    Compares each file's detections with the original detector's on validation images.

    Example: gdetkd export runs/student --onnx
    """
    if not (onnx or torchscript):
        raise options.UsageError("no format given; add --onnx, --torchscript or both")

    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_export

    perform(
        partial(run_export, target, onnx=onnx, torchscript=torchscript, output=output),
        render.format_export,
        as_json=as_json,
    )
