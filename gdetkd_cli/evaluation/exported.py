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
from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.memory import describe_exhaustion
from gdetkd_cli.probing.formats.files import DESCRIPTION_FILE, load_torchscript
from gdetkd_cli.probing.formats.metadata import ARCHITECTURE, OWN, parse_notes, read_class_names
from gdetkd_cli.probing.formats.runner import list_not_finite
from gdetkd_cli.structures import Detections, group_by_size

INPUT = "image"
OUTPUTS = ("boxes", "scores", "labels")
BATCH_INPUT = "images"
BATCH_OUTPUTS = (*OUTPUTS, "counts")

_VERSION = "gdetkd"
_FATAL = 4  # onnxruntime also logs to stderr the errors that it raises


class NotOursError(ModelError):
    """A complete file that gdetkd did not export."""


def describe(detector: Detector, architecture: dict[str, Any], *, batch: int | None = None) -> dict[str, str]:
    """The description in an exported file.

    It has gdetkd's version, class names and architecture (the last two as JSON), and the keys that other runtimes read.

    Args:
        batch: images per run of a batched file, 0 for any number; None: the file is not batched.
    """
    try:
        stride = {"stride": str(round(max(max(level.stride) for level in detector.levels)))}
    except ModelError:  # weights that are not finite have no levels to measure; the file can still be written
        stride = {}
    free = {"args": str({"batch": 1, "dynamic": True})} if batch == 0 else {}  # as Ultralytics states a free number
    return stride | {
        "names": str(dict(enumerate(detector.class_names))),
        "task": "detect",
        "batch": str(batch or 1),
        **free,
        _VERSION: __version__,
        OWN: json.dumps(detector.class_names),
        ARCHITECTURE: json.dumps(architecture),
    }


class OnnxDetector:
    """An ONNX file that gdetkd exported, run by onnxruntime.

    Attributes:
        class_names: K names, label k is ``class_names[k - 1]``.
        batch: images of one run; 0: any number.
    """

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        """Reads the file.

        Args:
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
        if outputs not in (OUTPUTS, BATCH_OUTPUTS):
            raise NotOursError(
                f"{path} was not exported by gdetkd: expected the outputs {', '.join(OUTPUTS)}, "
                f"got {', '.join(outputs)}"
            )
        self.class_names = _read_class_names(path, self._session.get_modelmeta().custom_metadata_map)
        self._path = path
        self._batched = outputs == BATCH_OUTPUTS
        shape = self._session.get_inputs()[0].shape
        self.batch: int = next((side for side in shape[:1] if isinstance(side, int)), 0) if self._batched else 1

    def list_bad_weights(self) -> list[str]:
        """Names of the weights with NaN or infinity."""
        from gdetkd_cli.probing.formats.onnx import read_bad_initializers  # onnx is slow to import

        return read_bad_initializers(self._path)

    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1; boxes in each image's own pixels.

        A batched file runs on images of one size together, and on images of zeros where there are too few.

        Raises:
            ModelError: the file fails on an image, as one does whose export fixed a size.
        """
        if not self._batched:
            return [Detections(*self._run(INPUT, image)) for image in images]
        found: dict[int, Detections] = {}
        for places in group_by_size((image.shape for image in images), self.batch):
            stacked = torch.stack([images[place] for place in places])
            absent = stacked.new_zeros((max(0, self.batch - len(places)), *stacked.shape[1:]))
            boxes, scores, labels, counts = self._run(BATCH_INPUT, torch.cat([stacked, absent]))
            for row, place in enumerate(places):
                own = slice(int(counts[row]))
                found[place] = Detections(boxes[row, own], scores[row, own], labels[row, own])
        return [found[place] for place in range(len(images))]

    def _run(self, name: str, value: Tensor) -> list[Tensor]:
        try:
            outputs = self._session.run(None, {name: value.cpu().contiguous().numpy()})
        except Exception as error:  # onnxruntime's errors have no common base
            raise _describe_failure(self._path, value, get_first_line(error)) from error
        return [torch.from_numpy(array) for array in outputs]


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
        self._path, self._module = path, load_torchscript(path, device, files)
        self.class_names = _read_class_names(path, parse_notes(files[DESCRIPTION_FILE]))

    def list_bad_weights(self) -> list[str]:
        """Names of the weights with NaN or infinity."""
        return list_not_finite(self._module.state_dict())

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1, one at a time; boxes in each image's own pixels.

        Raises:
            ModelError: the file fails on an image, as on one that is too narrow for its resize.
        """
        return [Detections(*self._run(image)) for image in images]

    def _run(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        try:
            found: tuple[Tensor, Tensor, Tensor] = self._module(image)
        except RuntimeError as error:
            if describe_exhaustion(error) is not None:
                raise
            reason = str(error).strip().splitlines()[-1]  # behind two pages of the script's own traceback
            raise _describe_failure(self._path, image, reason) from error
        return found


def _describe_failure(path: Path, image: Tensor, reason: str) -> ModelError:
    height, width = image.shape[-2:]
    return ModelError(f"{path} fails on an image of {height} x {width} pixels ({reason[:200]})")


def _read_class_names(path: Path, description: Mapping[str, object]) -> tuple[str, ...]:
    names = read_class_names(description) if OWN in description else ()
    if not names:
        raise NotOursError(f"{path} was not exported by gdetkd: it has no class names")
    return names
