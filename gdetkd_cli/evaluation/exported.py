"""Exported detector files as predictors, and the description inside each file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from gdetkd_cli import __version__
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.scripted import ARCHITECTURE, CLASSES
from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.probing.formats.files import DESCRIPTION_FILE, load_torchscript
from gdetkd_cli.probing.formats.metadata import parse_notes, read_class_names
from gdetkd_cli.probing.formats.runner import list_not_finite
from gdetkd_cli.structures import Detections

INPUT = "image"
OUTPUTS = ("boxes", "scores", "labels")

_VERSION = "gdetkd"
_FATAL = 4  # onnxruntime also logs to stderr the errors that it raises


class NotOursError(ModelError):
    """A complete file that gdetkd did not export."""


def describe(detector: Detector, architecture: dict[str, Any]) -> dict[str, str]:
    """The description in an exported file.

    It has gdetkd's version, class names and architecture (the last two as JSON), and the keys that other runtimes read.
    """
    try:
        stride = {"stride": str(round(max(max(level.stride) for level in detector.levels)))}
    except ModelError:  # weights that are not finite have no levels to measure; the file can still be written
        stride = {}
    return stride | {
        "names": str(dict(enumerate(detector.class_names))),
        "task": "detect",
        "batch": "1",
        _VERSION: __version__,
        CLASSES: json.dumps(detector.class_names),
        ARCHITECTURE: json.dumps(architecture),
    }


class OnnxDetector:
    """An ONNX file that gdetkd exported, run by onnxruntime.

    Attributes:
        class_names: K names, label k is ``class_names[k - 1]``.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """Reads the file.

        Args:
            path: the file.
            device: ``cpu``, or ``cuda`` to use a GPU if this onnxruntime supports it.

        Raises:
            NotOursError: gdetkd did not export it.
            ModelError: the file is not complete ONNX.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = ["CUDAExecutionProvider"] if device == "cuda" else []
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=[*providers, "CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            raise ModelError(f"{path} is not a whole ONNX file ({get_first_line(error)})") from error
        outputs = tuple(output.name for output in self._session.get_outputs())
        if outputs != OUTPUTS:
            raise NotOursError(
                f"{path} was not exported by gdetkd: expected the outputs {', '.join(OUTPUTS)}, "
                f"got {', '.join(outputs)}"
            )
        self.class_names = _read_class_names(path, self._session.get_modelmeta().custom_metadata_map)
        self._path = path

    def list_bad_weights(self) -> list[str]:
        """Names of the weights with NaN or infinity."""
        from gdetkd_cli.probing.formats.onnx import read_bad_initializers  # onnx is slow to import

        return read_bad_initializers(self._path)

    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1, one at a time; boxes in each image's own pixels.

        Raises:
            ModelError: the file fails on an image, as one does whose export fixed a size.
        """
        return [self._predict(image) for image in images]

    def _predict(self, image: Tensor) -> Detections:
        try:
            outputs = self._session.run(OUTPUTS, {INPUT: image.cpu().contiguous().numpy()})
        except Exception as error:  # onnxruntime's errors have no common base
            height, width = image.shape[-2:]
            reason = get_first_line(error)[:200]
            raise ModelError(f"{self._path} fails on an image of {height} x {width} pixels ({reason})") from error
        boxes, scores, labels = (torch.from_numpy(array) for array in outputs)
        return Detections(boxes=boxes, scores=scores, labels=labels)


class ScriptedDetector:
    """A TorchScript file that gdetkd exported.

    Attributes:
        class_names: K names, label k is ``class_names[k - 1]``.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """Reads the file.

        Raises:
            NotOursError: gdetkd did not export it.
            ModelError: the file is not complete TorchScript.
        """
        files = {DESCRIPTION_FILE: ""}
        self._module = load_torchscript(path, device, files)
        self.class_names = _read_class_names(path, parse_notes(files[DESCRIPTION_FILE]))

    def list_bad_weights(self) -> list[str]:
        """Names of the weights with NaN or infinity."""
        return list_not_finite(self._module.state_dict())

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1, one at a time; boxes in each image's own pixels."""
        return [Detections(*self._module(image)) for image in images]


def _read_class_names(path: Path, description: Mapping[str, object]) -> tuple[str, ...]:
    names = read_class_names(description) if CLASSES in description else ()
    if not names:
        raise NotOursError(f"{path} was not exported by gdetkd: it has no class names")
    return names
