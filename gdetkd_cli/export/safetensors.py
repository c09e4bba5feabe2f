"""A detector's weights as a safetensors file, which other tools read without pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.evaluation.exported import describe
from gdetkd_cli.files import write_file


def export_safetensors(detector: Detector, path: Path, *, architecture: dict[str, Any]) -> str:
    """Writes the detector's state_dict, with the class names and the description in the file's metadata.

    A tensor that several names share is written under each of them, so that ``load_state_dict`` needs no exception.

    Args:
        architecture: the description that rebuilds the detector.

    Returns:
        The name of the writer.

    Raises:
        DiskError: the disk is full.
    """
    # safetensors refuses tensors that share memory.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in detector.module.state_dict().items()}
    notes = describe(detector, architecture)
    del notes["batch"]  # of a file that runs
    content = save(state, {"format": "pt", **notes})
    write_file(path, lambda file: file.write(content), size=len(content))  # save_file lets the owner alone read it
    return f"safetensors {safetensors.__version__}, {len(state)} tensors"
