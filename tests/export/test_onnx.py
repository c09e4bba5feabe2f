"""ONNX files of every family: their detections and their description."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from gdetkd_cli import __version__
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ExportError, ModelError
from gdetkd_cli.evaluation.exported import OnnxDetector
from gdetkd_cli.export.onnx import OPSET, export_onnx
from gdetkd_cli.export.parity import Cut, build_empty_image, check_parity
from gdetkd_cli.export.single_image import SingleImage, build_example_image

Lively = Callable[..., tuple[Detector, dict[str, Any]]]


@pytest.mark.parametrize("family", ["faster-rcnn", "cascade-rcnn", "retinanet", "fcos", "ssdlite"])
def test_file_finds_what_the_detector_finds(family: str, lively: Lively, images: list[Tensor], tmp_path: Path) -> None:
    detector, architecture = lively(family)
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture)
    empty = build_empty_image(detector, (64, 80))
    parity = check_parity(detector, OnnxDetector(path), [*images, empty], cut=Cut.of(detector.module))
    assert parity.passed, parity
    assert parity.empty == 1
    assert parity.detections > 10 * len(images)


@pytest.mark.parametrize(
    ("family", "body"),
    [("retinanet", "convnext_atto"), ("fcos", "mobilenetv4_conv_small"), ("faster-rcnn", "efficientnet_lite0")],
)
def test_file_of_a_timm_body(family: str, body: str, lively: Lively, images: list[Tensor], tmp_path: Path) -> None:
    detector, architecture = lively(family, body)
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture)
    parity = check_parity(detector, OnnxDetector(path), images, cut=Cut.of(detector.module))
    assert parity.passed, parity
    assert parity.detections > 10 * len(images)


def test_file_that_fails_on_an_image(lively: Lively, tmp_path: Path) -> None:
    detector, architecture = lively("retinanet", "mobilevit_xxs")  # its attention is traced for one size
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture)
    with pytest.raises(ModelError, match=r"student\.onnx fails on an image of 64 x 200 pixels"):
        OnnxDetector(path).predict([torch.rand(3, 64, 200)])


def test_file_describes_itself_and_the_exporter_is_quiet(
    lively: Lively, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    detector, architecture = lively("fcos")
    path = tmp_path / "student.onnx"
    before = {name: value.clone() for name, value in detector.module.state_dict().items()}
    with warnings.catch_warnings(record=True, action="always") as heard:
        exporter = export_onnx(detector, path, architecture=architecture)
    assert heard == []
    assert capfd.readouterr() == ("", "")
    assert exporter == f"torch.onnx TorchScript, opset {OPSET}"
    assert [p.name for p in tmp_path.iterdir()] == ["student.onnx"]

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (version,) = (entry.version for entry in model.opset_import if entry.domain == "")
    assert version == OPSET
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["gdetkd"] == __version__
    assert json.loads(properties["gdetkd.classes"]) == list(detector.class_names)
    assert json.loads(properties["gdetkd.architecture"]) == architecture
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value or dim.dim_param for dim in shape] == [3, "height", "width"]

    # The detector itself is left as it was.
    after = detector.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in detector.module.parameters())


def test_file_bears_a_image_without_proposals(lively: Lively, tmp_path: Path) -> None:
    detector, architecture = lively("faster-rcnn")
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture)
    (found,) = OnnxDetector(path).predict([torch.full((3, 64, 80), torch.nan)])  # no objectness passes a threshold
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)


def test_file_is_right_though_its_example_had_no_detections(
    lively: Lively, images: list[Tensor], tmp_path: Path
) -> None:
    detector, architecture = lively("faster-rcnn")
    heads: Any = detector.module.roi_heads
    heads.score_thresh = float(detector.predict([build_example_image()])[0].scores.max())
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture)
    parity = check_parity(detector, OnnxDetector(path), images, cut=Cut.of(detector.module))
    assert parity.passed, parity
    assert parity.detections > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("limits", [(64, 96), (800, 1333)])
def test_resizes_to_torchvisions_eager_size(tiny_detector: Callable[..., Detector], limits: tuple[int, int]) -> None:
    detector = tiny_detector("fcos", image_size=limits)
    original: Any = detector.module.eval().transform
    exact: Any = SingleImage(detector).detector.transform
    scripted = torch.jit.script(exact)
    sizes = [(height, width) for height in range(30, 500, 67) for width in range(30, 500, 43)]
    for size in sizes if limits[0] < 100 else sizes[::7]:
        image = torch.zeros(1, *size)
        expected = original.resize(image)[0].shape
        assert exact.resize(image)[0].shape == expected, size
        assert scripted.resize(image)[0].shape == expected, size


def test_an_exporter_that_gives_up_is_one_sentence(
    lively: Lively, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*args: object, **options: object) -> None:
        raise torch.onnx.OnnxExporterError("no symbol for aten::wobble\nand a page of details")

    detector, architecture = lively("fcos")
    monkeypatch.setattr(torch.onnx, "export", give_up)
    with pytest.raises(ExportError, match=r"cannot write this detector as ONNX: no symbol for aten::wobble$"):
        export_onnx(detector, tmp_path / "student.onnx", architecture=architecture)
