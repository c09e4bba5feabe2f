"""Exported files as predictors, and other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ModelError
from gdetkd_cli.evaluation.exported import OnnxDetector, ScriptedDetector
from gdetkd_cli.export.onnx import export_onnx
from gdetkd_cli.export.torchscript import export_torchscript

Write = Callable[[Path, dict[type, Path]], object]


@pytest.fixture(scope="module")
def detector(tiny_detector: Callable[..., Detector]) -> Detector:
    return tiny_detector("faster-rcnn")  # its fresh weights say about 1/4 for every class everywhere


@pytest.fixture(scope="module")
def files(
    detector: Detector, tiny_description: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[type, Path]:
    folder = tmp_path_factory.mktemp("exported")
    paths = {OnnxDetector: folder / "student.onnx", ScriptedDetector: folder / "student.torchscript"}
    export_onnx(detector, paths[OnnxDetector], architecture=tiny_description("faster-rcnn"))
    export_torchscript(detector, paths[ScriptedDetector], architecture=tiny_description("faster-rcnn"))
    return paths


@pytest.mark.parametrize("reader", [OnnxDetector, ScriptedDetector])
def test_predicts_what_the_detector_predicts(
    reader: type[OnnxDetector | ScriptedDetector], files: dict[type, Path], detector: Detector
) -> None:
    generator = torch.Generator().manual_seed(0)
    images: list[Tensor] = [torch.rand(3, 64, 64, generator=generator), torch.rand(3, 40, 72, generator=generator)]
    images.append(images[1].flip(2).transpose(1, 2))  # not contiguous
    exported = reader(files[reader])
    assert exported.class_names == detector.class_names
    found = exported.predict(images)
    assert len(found) == len(images)
    for image, one in zip(images, found, strict=True):
        (expected,) = detector.predict([image])
        assert len(one.scores) > 0
        assert one.labels.dtype == torch.int64
        assert torch.allclose(one.scores, expected.scores, atol=1e-4)
        assert torch.equal(one.scores, one.scores.sort(descending=True).values)
    assert exported.predict([]) == []


@pytest.mark.parametrize("reader", [OnnxDetector, ScriptedDetector])
def test_a_failure_on_an_image_is_one_sentence(
    reader: type[OnnxDetector | ScriptedDetector], files: dict[type, Path]
) -> None:
    expected = rf"{files[reader].name} fails on an image of 3000 x 1 pixels \(.{{1,200}}\)$"
    with pytest.raises(ModelError, match=expected):
        reader(files[reader]).predict([torch.zeros(3, 3000, 1)])


def _graph(path: Path, outputs: tuple[str, ...]) -> None:
    """Writes a valid ONNX file that returns its input."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("image", *outputs)]
    nodes = [helper.make_node("Identity", ["image"], [name]) for name in outputs]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Identity()), path)


def _write_half(reader: type) -> Write:
    return lambda path, files: path.write_bytes(files[reader].read_bytes()[: files[reader].stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("reader", "write", "message"),
    [
        (OnnxDetector, lambda path, files: None, "is not a whole ONNX file"),
        (OnnxDetector, lambda path, files: path.write_bytes(b""), "is not a whole ONNX file"),
        (OnnxDetector, lambda path, files: path.write_text("hello"), "is not a whole ONNX file"),
        (OnnxDetector, _write_half(OnnxDetector), "is not a whole ONNX file"),
        (
            OnnxDetector,
            lambda path, files: _graph(path, ("logits",)),
            "was not exported by gdetkd: expected the outputs boxes, scores, labels, got logits",
        ),
        (OnnxDetector, lambda path, files: _graph(path, ("boxes", "scores", "labels")), "it has no class names"),
        (ScriptedDetector, lambda path, files: None, "is not a whole file of torch"),
        (ScriptedDetector, lambda path, files: path.write_text("hello"), "is not a whole file of torch"),
        (ScriptedDetector, _write_half(ScriptedDetector), "is not a whole file of torch"),
        (ScriptedDetector, lambda path, files: torch.save({"a": 1}, path), "is not a whole TorchScript file"),
        (ScriptedDetector, lambda path, files: _script(path), "it has no class names"),
    ],
)
def test_files_that_are_no_detector(
    reader: type[OnnxDetector | ScriptedDetector],
    write: Write,
    message: str,
    files: dict[type, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model"
    write(path, files)
    with pytest.raises(ModelError, match=message) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
