"""TorchScript files equal the detector and need no gdetkd."""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import DiskError, ExportError
from gdetkd_cli.evaluation.exported import ScriptedDetector
from gdetkd_cli.export.parity import Cut, build_empty_image, check_parity
from gdetkd_cli.export.torchscript import export_torchscript

Lively = Callable[..., tuple[Detector, dict[str, Any]]]

LOAD = """
import sys
sys.modules["gdetkd_cli"] = None  # an import of it fails
import torch, torchvision
boxes, scores, labels = torch.jit.load(sys.argv[1])(torch.load(sys.argv[2]))
print(len(boxes), len(scores), len(labels))
"""


@pytest.mark.parametrize("family", ["faster-rcnn", "cascade-rcnn", "retinanet", "fcos", "ssdlite"])
def test_file_finds_what_the_detector_finds(family: str, lively: Lively, images: list[Tensor], tmp_path: Path) -> None:
    detector, architecture = lively(family)
    path = tmp_path / "student.torchscript"
    with warnings.catch_warnings(record=True, action="always") as heard:
        exporter = export_torchscript(detector, path, architecture=architecture)
        exported = ScriptedDetector(path)
        empty = build_empty_image(detector, (64, 80))
        parity = check_parity(detector, exported, [*images, empty], cut=Cut.of(detector.module))
    assert heard == []
    assert parity.passed, parity
    assert parity.max_box_error <= 1e-3
    assert parity.empty == 1
    assert parity.detections > 10 * len(images)
    assert exporter == f"torch.jit.script, torch {torch.__version__}"
    assert exported.class_names == detector.class_names


def test_file_loads_without_this_package(lively: Lively, images: list[Tensor], tmp_path: Path) -> None:
    detector, architecture = lively("faster-rcnn")
    path, image = tmp_path / "student.torchscript", tmp_path / "image.pt"
    export_torchscript(detector, path, architecture=architecture)
    torch.save(images[1], image)
    command = [sys.executable, "-c", LOAD, str(path), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    count = len(detector.predict([images[1]])[0].scores)
    assert done.stdout.split() == [str(count)] * 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\nUnknown type name 'Wobble':\n  a page of details"), "Unknown type name 'Wobble':"),
        (OSError("Failed to get source for <class 'Wobble'>"), "Failed to get source for <class 'Wobble'>"),
    ],
)
def test_a_detector_that_cannot_be_scripted_is_one_sentence(
    lively: Lively, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def give_up(module: object) -> None:
        raise error

    detector, architecture = lively("fcos")
    monkeypatch.setattr(torch.jit, "script", give_up)
    with pytest.raises(ExportError, match=rf"cannot script this detector: {reason}$"):
        export_torchscript(detector, tmp_path / "student.torchscript", architecture=architecture)


def test_a_full_disk_is_one_sentence(lively: Lively, tmp_path: Path) -> None:
    """torch's own writer would end the process."""
    detector, architecture = lively("fcos")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"student.torchscript could not be written: it needs"):
            export_torchscript(detector, tmp_path / "student.torchscript", architecture=architecture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
