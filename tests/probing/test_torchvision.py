"""TorchScript files of torchvision's detectors give the same facts as the eager detectors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torchvision.models import detection

from gdetkd_cli.commands import run_probe
from gdetkd_cli.commands.probe import ProbeOptions
from gdetkd_cli.errors import ModelError

# name -> (arguments, strides in pixels of the network's input, region embedding's channels)
CASES: dict[str, tuple[dict[str, int], list[int], int | None]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ({"min_size": 192, "max_size": 256}, [32, 32, 64], 1024),
    "retinanet_resnet50_fpn": ({"min_size": 192, "max_size": 256}, [8, 16, 32, 64, 128], None),
    "ssdlite320_mobilenet_v3_large": ({}, [16, 32, 64, 128, 256, 512], None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_scripted_detector(name: str, tmp_path: Path) -> None:
    arguments, strides, embedding = CASES[name]
    torch.manual_seed(0)
    module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4, **arguments).eval()
    path = tmp_path / "model.bin"  # recognised by its content, not by its name
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), path)

    report = run_probe(str(path), ProbeOptions(size=(192, 256)))
    path.unlink()

    scale = (1.0, 1.0) if arguments else (192 / 320, 256 / 320)
    assert [level.stride for level in report.levels] == [
        pytest.approx((stride * scale[0], stride * scale[1]), rel=1e-3) for stride in strides
    ]
    assert report.format == "torchscript"
    assert report.call == "list of (3, H, W) images"
    assert report.family == ("two-stage" if embedding else "unknown")
    assert (report.region_embedding or {}).get("channels") == embedding


def test_a_torchscript_file_cut_short(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Conv2d(3, 4, 3)), whole)
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ModelError, match=r"cut\.pt"):
        run_probe(str(cut))


def test_an_onnx_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08rest")
    with pytest.raises(ModelError, match=r"model\.onnx is not a whole ONNX file"):
        run_probe(str(path))
