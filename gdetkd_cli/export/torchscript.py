"""A detector as a TorchScript file, which ``torch.jit.load`` reads after ``import torchvision`` (for its operators)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ExportError, get_first_line
from gdetkd_cli.evaluation.exported import describe
from gdetkd_cli.export.single_image import SingleImage
from gdetkd_cli.files import write_file
from gdetkd_cli.probing.formats.files import DESCRIPTION_FILE


def export_torchscript(detector: Detector, path: Path, *, architecture: dict[str, Any]) -> str:
    """Writes the detector as TorchScript: ``image`` (3, H, W) in 0..1 -> boxes (D, 4), scores (D,), labels (D,).

    Args:
        architecture: the description that rebuilds the detector, stored in the file with the class names.

    Returns:
        The name of the exporter.

    Raises:
        ExportError: the detector cannot be scripted.
        DiskError: the disk is full.
    """
    image, notes = SingleImage(detector), describe(detector, architecture)
    try:
        with warnings.catch_warnings(action="ignore"):  # every function of torch.jit warns that it is deprecated
            scripted = torch.jit.script(image)
            content = scripted.save_to_buffer(_extra_files={DESCRIPTION_FILE: json.dumps(notes)})
    except (RuntimeError, OSError) as error:  # the second: it finds no source of a class, as of transformers' configs
        reason = get_first_line(error)
        raise ExportError(f"torch {torch.__version__} cannot script this detector: {reason}") from error
    # Through Python, because torch's own writer of files ends the process when the disk is full.
    write_file(path, lambda file: file.write(content), size=len(content))
    return f"torch.jit.script, torch {torch.__version__}"
