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
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Write the weights as safetensors, which needs no pickle.")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="With --onnx: also a file with float16 layers, NAME.fp16.onnx.")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="With --onnx: also a file with 8-bit layers, NAME.int8.onnx, calibrated on training images."
        ),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=0,
            metavar="N",
            help="With --onnx: the file takes N images of one size together. 0: any number, for DETR-like students. "
            "Default: one image.",
        ),
    ] = None,
    opset: Annotated[int, typer.Option("--opset", min=16, max=20, help="Version of ONNX's operators.")] = 17,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="PATH", help="File or folder. Default: beside the detector.")
    ] = None,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Export a trained student to ONNX, TorchScript or safetensors.

    Compares each file's detections with the original detector's on validation images.

    Example: gdetkd export runs/student --onnx

    Several images at once: gdetkd export runs/student --onnx --batch 4
    """
    if not (onnx or torchscript or safetensors):
        raise options.UsageError("no format given; add --onnx, --torchscript, --safetensors, or several of them")
    if (half or int8 or batch is not None) and not onnx:
        raise options.UsageError("--half, --int8 and --batch need --onnx")

    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_export

    work = partial(run_export, target, onnx=onnx, torchscript=torchscript, safetensors=safetensors, output=output)
    perform(partial(work, half=half, int8=int8, opset=opset, batch=batch), render.format_export, as_json=as_json)
