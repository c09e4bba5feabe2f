"""Recognises the kind of a model file by its content, and opens the kinds that other tools write."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.probing.formats.exported import load_exported
from gdetkd_cli.probing.formats.metadata import parse_notes, read_class_names, read_size
from gdetkd_cli.probing.formats.operators import check_torchscript
from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner, list_calls
from gdetkd_cli.probing.formats.search import find_weight_type
from gdetkd_cli.probing.second_inputs import KNOWN, SecondInput

DESCRIPTION_FILE = "gdetkd.json"  # in TorchScript files exported by gdetkd
_YOLO_FILE = "config.txt"  # in TorchScript files exported by ultralytics; also JSON
_ONNX_START = b"\x08"  # the first field of every ONNX file, its format version

Kind = Literal["onnx", "torchscript", "exported", "checkpoint"]


def detect_kind(path: Path) -> Kind:
    """Returns the kind of a model file; anything unrecognised counts as a checkpoint."""
    with path.open("rb") as file:
        start = file.read(9)
    if is_safetensors(start, path.stat().st_size):  # whose first byte may be ONNX's
        return "checkpoint"
    if start[:1] == _ONNX_START:
        return "onnx"
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):  # all of torch's formats are ZIP files; only TorchScript has constants
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):  # damaged
        return "checkpoint"
    if any(name.endswith("/constants.pkl") for name in names):
        return "torchscript"
    if any(name.endswith("/archive_format") for name in names):
        return "exported"
    return "checkpoint"


def is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes begins as safetensors does: the length of a header, which is a JSON object."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def open_runner(path: Path, kind: Kind, *, last: bool = False) -> Runner:
    """Opens a model written by another tool for probing.

    Args:
        last: whether a TorchScript model takes images as (H, W, 3); files of the other kinds contain this.

    Raises:
        ModelError: the file is incomplete, or needs pickled code.
    """
    if kind == "onnx":
        from gdetkd_cli.probing.formats.onnx import OnnxRunner  # onnx and onnxruntime are slow to import

        return OnnxRunner(path)
    if kind == "exported":
        return load_exported(path)
    texts = {DESCRIPTION_FILE: "", _YOLO_FILE: ""}
    module = load_torchscript(path, extra_files=texts).eval()
    if not hasattr(module, "forward"):
        raise ModelError(f"{path} has no method forward, with which gdetkd calls a model; save a module that has one")
    notes = parse_notes(texts[DESCRIPTION_FILE] or texts[_YOLO_FILE])
    dtype = find_weight_type(module)
    inputs, unknown = _read_inputs(module)
    return ModuleRunner(
        module,
        calls=[replace(call, dtype=dtype) for call in list_calls(last=last)],
        size=read_size(notes.get("imgsz")),
        class_names=read_class_names(notes),
        inputs=inputs,
        unknown=unknown,
    )


def _read_inputs(module: torch.jit.ScriptModule) -> tuple[list[SecondInput | None], list[str]]:
    """Returns a module's inputs, None for the image, and the names of those that are unknown."""
    arguments = module.forward.schema.arguments[1:]  # type: ignore[attr-defined]  # of a loaded method
    needed = [argument.name for argument in arguments if not argument.has_default_value()]
    unknown = [name for name in needed if name not in KNOWN][1:]  # the first is the image
    inputs = [SecondInput.declare(name) if name in KNOWN else None for name in needed if name not in unknown]
    return inputs or [None], unknown


def load_torchscript(
    path: Path, device: str = "cpu", extra_files: dict[str, str] | None = None
) -> torch.jit.ScriptModule:
    """Reads a TorchScript file, and its extra files into the values of ``extra_files``.

    Raises:
        ModelError: not a whole TorchScript file, or one with operators that are unknown here or can do more than
            compute (see ``check_torchscript``).
    """
    check_torchscript(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.jit's deprecation
            # Not map_location=device: SSD keeps tensors on the CPU that are not buffers.
            module = torch.jit.load(path, map_location="cpu", _extra_files=extra_files)
    except (RuntimeError, ValueError, LookupError) as error:
        unknown = [line.strip() for line in str(error).splitlines() if "Unknown builtin op" in line]
        if unknown:
            raise ModelError(
                f"{path} calls an operator that is not installed ({unknown[0]}); install its package or use ONNX"
            ) from error
        raise ModelError(f"{path} is not a whole TorchScript file ({get_first_line(error)})") from error
    return module.to(device)
