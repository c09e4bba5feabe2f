"""What kind of model a file holds, told from its content, and reading TorchScript."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Literal

import torch
import torchvision  # noqa: F401  # registers the operators that a scripted detector calls

from gdetkd_cli.errors import ModelError

_ONNX_START = b"\x08"  # the first field of every ONNX file: the version of its format


def kind_of(path: Path) -> Literal["onnx", "torchscript", "checkpoint"]:
    """The kind of a model file; whatever is neither ONNX nor TorchScript counts as a checkpoint, to be read as one."""
    with path.open("rb") as file:
        if file.read(1) == _ONNX_START:
            return "onnx"
    if zipfile.is_zipfile(path):  # both of torch's formats are; only TorchScript has constants
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "torchscript"
    return "checkpoint"


def load_torchscript(
    path: Path, device: str = "cpu", extra_files: dict[str, str] | None = None
) -> torch.jit.ScriptModule:
    """Reads a TorchScript file; ``extra_files`` is filled with what the file holds under its keys.

    Raises:
        ModelError: not a whole TorchScript file, or one with operators that are not known here.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, and says so
            # Not with map_location=device: SSD keeps tensors that are no buffers on the CPU.
            module = torch.jit.load(path, map_location="cpu", _extra_files=extra_files)
    except (RuntimeError, ValueError) as error:
        unknown = [line.strip() for line in str(error).splitlines() if "Unknown builtin op" in line]
        if unknown:
            raise ModelError(f"{path} calls an operator that is not installed here ({unknown[0]})") from error
        raise ModelError(f"{path} is not a whole TorchScript file ({str(error).strip().splitlines()[0]})") from error
    return module.to(device)
