"""Batched ONNX files of every family: their shapes, their padding, and how they are read, checked and reduced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from query_models import STRIDES, make_config
from torch import Tensor
from torchvision.utils import save_image

from gdetkd_cli.commands import run_eval, run_export, run_predict
from gdetkd_cli.commands.export_images import arrange_batches
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.detectors import transformers
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ExportError
from gdetkd_cli.evaluation.exported import OnnxDetector
from gdetkd_cli.export.batch import _pad
from gdetkd_cli.export.onnx import ANY, export_onnx
from gdetkd_cli.export.parity import Cut, build_empty_image, check_parity
from gdetkd_cli.export.reduced import CalibrationImages, write_half, write_int8
from gdetkd_cli.recipe.schema import SyntheticData
from gdetkd_cli.structures import group_by_size

Lively = Callable[..., tuple[Detector, dict[str, Any]]]


def _list_dimensions(path: Path) -> dict[str, list[object]]:
    graph = onnx.load(path).graph
    return {
        value.name: [one.dim_value or one.dim_param for one in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def _read_metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_padding() -> None:
    values = torch.tensor([[1.0, 2], [3, 4]])
    assert _pad(values, torch.tensor([2, 4, 0])).tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    assert _pad(values[:0], torch.tensor([0, 1])).tolist() == [[0, 0]]
    assert _pad(values[:0], torch.tensor([0, 0])).shape == (0, 2)


def test_images_of_one_size_are_grouped() -> None:
    images = [torch.zeros(3, height, 8) for height in (4, 5, 4, 4, 5)]
    sizes = [image.shape for image in images]
    assert list(group_by_size(sizes, 2)) == [[0, 2], [3], [1, 4]]
    assert list(group_by_size(sizes, 0)) == [[0, 2, 3], [1, 4]]
    assert list(group_by_size([], 0)) == []


def test_parity_runs_on_different_images_in_batches_of_different_sizes() -> None:
    images = [torch.rand(3, 40, 60), torch.rand(3, 50, 30), torch.rand(3, 33, 70)]
    arranged = arrange_batches(images, 7)
    batches = [arranged[:7], arranged[7:14], arranged[14:]]
    sizes = [[tuple(image.shape[1:]) for image in batch] for batch in batches]
    assert sizes == [[(40, 60)] * 7, [(50, 30)] * 7, [(33, 70)] * 7]
    for batch in batches:
        assert not any(torch.equal(batch[i], batch[j]) for i in range(7) for j in range(i))
    assert [tuple(image.shape[1:]) for image in arrange_batches(images, ANY)] == [
        (40, 60),
        (50, 30),
        (50, 30),
        (33, 70),
        (33, 70),
        (33, 70),
    ]


@pytest.mark.parametrize("family", ["faster-rcnn", "cascade-rcnn", "retinanet", "fcos", "ssdlite"])
def test_a_batch_finds_what_the_detector_finds(
    family: str, lively: Lively, images: list[Tensor], tmp_path: Path
) -> None:
    detector, architecture = lively(family)
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture, batch=3)
    assert _list_dimensions(path) == {
        "images": [3, 3, "height", "width"],
        "boxes": [3, "detections", 4],
        "scores": [3, "detections"],
        "labels": [3, "detections"],
        "counts": [3],
    }
    assert _read_metadata(path)["batch"] == "3"
    empty = build_empty_image(detector, (64, 80))
    parity = check_parity(
        detector, OnnxDetector(path), arrange_batches([*images[:3], empty], 3), cut=Cut.of(detector.module)
    )
    assert parity.passed, parity
    assert parity.images == 9
    assert parity.detections > 50

    # Two images and zeros, of which one has no detections: behind an image's own rows there are zeros.
    empty = build_empty_image(detector, (96, 96))
    given = torch.stack([empty, images[0], torch.zeros(3, 96, 96)])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, scores, labels, counts = session.run(None, {"images": given.numpy()})
    (expected,) = detector.predict([images[0]])
    assert counts.dtype == np.int64
    assert counts.tolist()[:2] == [0, len(expected.scores)]
    assert boxes.shape[1] == max(counts)
    for row, count in enumerate(counts):
        assert (labels[row, :count] > 0).all()
        assert not boxes[row, count:].any() and not scores[row, count:].any() and not labels[row, count:].any()
    assert np.allclose(scores[1, : counts[1]], expected.scores.numpy(), atol=1e-3)


def test_no_image_of_a_batch_has_detections(lively: Lively, tmp_path: Path) -> None:
    detector, architecture = lively("faster-rcnn")
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture, batch=2)
    for found in OnnxDetector(path).predict([torch.full((3, 64, 80), torch.nan)] * 2):
        assert found.boxes.shape == (0, 4)
        assert found.scores.shape == found.labels.shape == (0,)


def test_images_of_any_number_and_size_keep_their_order(lively: Lively, images: list[Tensor], tmp_path: Path) -> None:
    detector, architecture = lively("fcos")
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=architecture, batch=2)
    exported = OnnxDetector(path)
    assert exported.batch == 2
    mixed = [images[0], images[1], images[0].flip(2), images[1].flip(1), images[0].flip(1)]
    found = exported.predict(mixed)
    for image, one in zip(mixed, found, strict=True):
        (expected,) = detector.predict([image])
        assert torch.allclose(one.scores, expected.scores, atol=1e-3)
        assert torch.allclose(one.boxes, expected.boxes, atol=0.05)
    assert exported.predict([]) == []


@pytest.mark.parametrize("name", list(STRIDES))
def test_a_detr_like_detector_takes_any_number(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    description = transformers.describe_fresh(make_config(name), (64, 96) if name == "yolos" else (128, 192))
    detector = transformers.build(description, ("car", "bus", "bike"))
    for parameter in detector.module.parameters():
        if parameter.dim() > 1:  # not the scales of normalization, which could make scores equal
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    detector.module.train()
    with torch.no_grad():
        for _ in range(20):  # batch normalization measures its statistics; without them all scores are nearly equal
            detector.module.model(torch.rand(2, 3, *description["preprocessor"]["size"].values()))
    detector.module.eval()
    path = tmp_path / "student.onnx"
    export_onnx(detector, path, architecture=description, batch=ANY)
    dimensions = _list_dimensions(path)
    assert dimensions["images"] == ["batch", 3, "height", "width"]
    assert (dimensions["boxes"][0], dimensions["counts"]) == ("batch", ["batch"])
    metadata = _read_metadata(path)
    assert (metadata["batch"], metadata["args"]) == ("1", "{'batch': 1, 'dynamic': True}")
    exported = OnnxDetector(path)
    assert exported.batch == ANY
    images = arrange_batches([torch.rand(3, *size) for size in ((64, 96), (100, 120), (301, 200))], ANY)
    parity = check_parity(detector, exported, images, cut=Cut.of(detector.module), relative=1e-3, together=True)
    assert parity.passed, parity
    assert parity.images == 6
    if name == "d_fine":
        write_half(path, tmp_path / "half.onnx")
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        write_int8(path, tmp_path / "int8.onnx", CalibrationImages(sizes, images.__getitem__))
        for file in ("half.onnx", "int8.onnx"):
            parity = check_parity(
                detector, OnnxDetector(tmp_path / file), images, cut=Cut.of(detector.module), together=True
            )
            assert parity.max_score_error < 0.2, parity


def test_other_detectors_need_a_number(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no DETR-like detector, .* for example --batch 4"):
        run_export("builtin:shapes-teacher", onnx=True, torchscript=False, batch=ANY, output=tmp_path / "t.onnx")
    assert not list(tmp_path.iterdir())


def test_batched_files_are_evaluated_and_reduced(tmp_path: Path) -> None:
    result = run_export(
        "builtin:shapes-teacher",
        onnx=True,
        torchscript=False,
        half=True,
        int8=True,
        batch=4,
        output=tmp_path / "t.onnx",
    )
    whole = result.files[0]
    assert whole.exporter.endswith("batches of 4 images")
    assert (whole.parity.images, whole.parity.passed) == (12, True)
    assert whole.parity.empty > 0
    data = SyntheticData(format="synthetic", val_images=10)  # the last batch has two images
    expected = run_eval("builtin:shapes-teacher", data=data).metrics
    found, halved, quantised = (run_eval(str(file.path), data=data).metrics for file in result.files)
    assert found.images == 10
    assert found.ap == pytest.approx(expected.ap, abs=0.05)
    assert halved.ap == pytest.approx(expected.ap, abs=0.5)
    assert quantised.ap == pytest.approx(expected.ap, abs=8)
    assert all(_read_metadata(file.path)["batch"] == "4" for file in result.files)

    scene = draw_split(split="val", images=1, size=128, seed=3).read(0)
    save_image(scene.float() / 255, tmp_path / "scene.png")
    own, batched = (
        run_predict(model, [str(tmp_path / "scene.png")]).per_class
        for model in ("builtin:shapes-teacher", str(whole.path))
    )
    assert own == batched
    assert own
