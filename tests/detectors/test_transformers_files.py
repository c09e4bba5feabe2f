"""Files of DETR-like detectors of transformers: student.pt, pretrained/, ONNX."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from query_models import CLASSES, STRIDES, build_detector, make_batch, make_config, shake
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from gdetkd_cli.detectors import catalog, transformers
from gdetkd_cli.errors import ExportError
from gdetkd_cli.evaluation.exported import OnnxDetector
from gdetkd_cli.export.onnx import ANY, export_onnx
from gdetkd_cli.export.parity import Cut, check_parity
from gdetkd_cli.structures import Batch, Detections


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


@pytest.mark.parametrize("name", tuple(STRIDES))
def test_files_give_the_same_detections(name: str, batch: Batch, tmp_path: Path) -> None:
    detector, description = build_detector(name)
    detector.module.train()
    detector.forward_train(batch)  # moves the statistics of batch normalization
    shake(detector)
    (expected, *_) = detector.predict(batch.images)
    catalog.save(tmp_path / "student.pt", detector, description)
    again = catalog.load(tmp_path / "student.pt").detector.predict(batch.images)[0]
    assert torch.equal(expected.boxes, again.boxes) and torch.equal(expected.scores, again.scores)

    transformers.save_pretrained(detector, description, tmp_path / "pretrained")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "pretrained").eval()
    assert model.config.id2label == dict(enumerate(CLASSES))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "pretrained")
    image = batch.images[0]  # of the model's own size, so that nothing is resized
    pixels = processor(images=[image], do_rescale=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels)
    (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[-2:]])
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        same = (expected.labels == label + 1) & ((expected.scores - score).abs() < 1e-4)
        inside = box.clamp(min=0).minimum(torch.tensor([image.shape[2], image.shape[1]] * 2))
        assert ((expected.boxes[same] - inside).abs() < 1e-3).all(dim=1).any()

    loaded, _, trained = transformers.load_pretrained(
        str(tmp_path / "pretrained"), CLASSES, keep_classes=False, image_size=None
    )
    assert trained and loaded.class_names == CLASSES
    # Not equal: a frozen layer rounds otherwise.
    boxes = loaded.predict(batch.images)[0].boxes
    assert torch.allclose(boxes.sort(0).values, expected.boxes.sort(0).values, atol=1e-3)


def test_other_classes_start_a_fresh_class_layer(tmp_path: Path) -> None:
    detector, description = build_detector("d_fine")
    transformers.save_pretrained(detector, description, tmp_path / "p")
    loaded, _, trained = transformers.load_pretrained(
        str(tmp_path / "p"), ("a", "b"), keep_classes=False, image_size=(96, 96)
    )
    assert not trained and loaded.class_names == ("a", "b")
    assert loaded.module.preparation.compute_size(10, 20) == (96, 96)
    kept, _, trained = transformers.load_pretrained(str(tmp_path / "p"), ("a",), keep_classes=True, image_size=None)
    assert trained and kept.class_names == CLASSES
    # As many other classes; and the same ones in another order, which the data follow.
    names = tuple(f"other {i}" for i in range(len(CLASSES)))
    other, _, trained = transformers.load_pretrained(str(tmp_path / "p"), names, keep_classes=False, image_size=None)
    own, loaded = (one.module.state_dict() for one in (detector, other))
    changed = {name for name in loaded if not torch.equal(own[name], loaded[name])}
    assert not trained and changed and all("class" in name or "enc_score" in name for name in changed)
    turned, _, trained = transformers.load_pretrained(
        str(tmp_path / "p"), CLASSES[::-1], keep_classes=False, image_size=None
    )
    assert trained and turned.class_names == CLASSES


@pytest.mark.parametrize("name", ["d_fine", "detr", "deformable_detr"])
def test_the_onnx_file_agrees_on_images_of_any_size(name: str, tmp_path: Path) -> None:
    # Not smaller: DETR's group norm over two cells would enlarge rounding errors.
    detector, description = build_detector(name, (128, 192))
    shake(detector)
    export_onnx(detector, tmp_path / "s.onnx", architecture=description)
    images = [torch.rand(3, *size) for size in ((64, 96), (100, 120), (301, 200))]
    parity = check_parity(detector, OnnxDetector(tmp_path / "s.onnx"), images, cut=Cut.of(detector.module))
    assert parity.passed, parity


@pytest.mark.parametrize("batch", [None, ANY])
def test_a_body_that_interpolates_its_positions_is_exported(batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    description = transformers.describe_fresh(make_config("rf_detr"), (112, 168))
    detector = shake(transformers.build(description, CLASSES))
    export_onnx(detector, tmp_path / "s.onnx", architecture=description, batch=batch)
    images = [torch.rand(3, *size) for size in ((112, 168), (100, 120))]
    parity = check_parity(detector, OnnxDetector(tmp_path / "s.onnx"), images, cut=Cut.of(detector.module))
    assert parity.passed, parity


def test_an_exporter_that_fails_prints_no_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        sys.stdout.write("Torch IR graph at exception")
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    detector, description = build_detector("yolos")
    with pytest.raises(ExportError, match="no such operator"):
        export_onnx(detector, tmp_path / "s.onnx", architecture=description)
    assert not capsys.readouterr().out


def test_an_export_may_differ_by_a_thousandth_of_the_image() -> None:
    @dataclass
    class Answer:
        shift: float

        def predict(self, images: list[Tensor]) -> list[Detections]:
            boxes = torch.tensor([[10.0, 10, 50, 50]]) + self.shift
            return [Detections(boxes=boxes, scores=torch.tensor([0.5]), labels=torch.tensor([1])) for _ in images]

    cut, images = Cut(score=-1.0, count=300), [torch.zeros(3, 100, 200)]
    for shift, passed in ((0.19, True), (0.21, False)):
        assert check_parity(Answer(0), Answer(shift), images, cut=cut, relative=1e-3).passed == passed
    assert not check_parity(Answer(0), Answer(0.06), images, cut=cut).passed
