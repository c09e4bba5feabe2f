"""What kind of model a file holds, told from its content, and reading the kinds that other tools write."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Literal

import torch
import torchvision  # noqa: F401  # registers the operators that a scripted detector calls

from gdetkd_cli.errors import ModelError, first_line
from gdetkd_cli.probing.formats.class_names import class_names_in
from gdetkd_cli.probing.formats.exported import load_exported
from gdetkd_cli.probing.formats.operators import check_torchscript
from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner, calls_for

DESCRIPTION_FILE = "gdetkd.json"  # in a TorchScript file that gdetkd exported
_YOLO_FILE = "config.txt"  # in one that ultralytics exported; JSON as well
_ONNX_START = b"\x08"  # the first field of every ONNX file: the version of its format


Kind = Literal["onnx", "torchscript", "exported", "checkpoint"]


def kind_of(path: Path) -> Kind:
    """The kind of a model file; what is of no other counts as a checkpoint, to be read as one."""
    with path.open("rb") as file:
        if file.read(1) == _ONNX_START:
            return "onnx"
    if zipfile.is_zipfile(path):  # all of torch's formats are; only TorchScript has constants there
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "torchscript"
        if any(name.endswith("/archive_format") for name in names):
            return "exported"
    return "checkpoint"


def open_runner(path: Path, kind: Kind, *, last: bool = False) -> Runner:
    """A model that another tool wrote, ready to be probed.

    Args:
        path: the file.
        kind: of it.
        last: a TorchScript model takes its images as (H, W, 3); the other kinds say so themselves.

    Raises:
        ModelError: not a whole file of its kind, or one that needs pickled code.
    """
    if kind == "onnx":
        from gdetkd_cli.probing.formats.onnx import OnnxRunner  # onnx and onnxruntime take their time

        return OnnxRunner(path)
    if kind == "exported":
        return load_exported(path)
    notes = {DESCRIPTION_FILE: "", _YOLO_FILE: ""}
    module = load_torchscript(path, extra_files=notes).eval()
    said = _parsed(notes[DESCRIPTION_FILE] or notes[_YOLO_FILE])
    calls = calls_for(last=last)
    return ModuleRunner(module, calls=calls, size=_size(said.get("imgsz")), class_names=class_names_in(said))


def _size(told: object) -> tuple[int, int] | None:
    """(height, width) pixels that ultralytics made a file for."""
    if isinstance(told, list) and len(told) == 2 and all(isinstance(side, int) and side > 0 for side in told):
        return told[0], told[1]
    return None


def _parsed(text: str) -> dict[str, object]:
    try:
        notes = json.loads(text or "{}")
    except ValueError:  # another tool's file, in a format of its own
        return {}
    return notes if isinstance(notes, dict) else {}


def load_torchscript(
    path: Path, device: str = "cpu", extra_files: dict[str, str] | None = None
) -> torch.jit.ScriptModule:
    """Reads a TorchScript file; ``extra_files`` is filled with what the file holds under its keys.

    Raises:
        ModelError: not a whole TorchScript file, or one with operators that are unknown here or can do more than
            compute (see ``check_torchscript``).
    """
    check_torchscript(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, and says so
            # Not with map_location=device: SSD keeps tensors that are no buffers on the CPU.
            module = torch.jit.load(path, map_location="cpu", _extra_files=extra_files)
    except (RuntimeError, ValueError) as error:
        unknown = [line.strip() for line in str(error).splitlines() if "Unknown builtin op" in line]
        if unknown:
            raise ModelError(f"{path} calls an operator that is not installed here ({unknown[0]})") from error
        raise ModelError(f"{path} is not a whole TorchScript file ({first_line(error)})") from error
    return module.to(device)
