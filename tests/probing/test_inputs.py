"""Images other than float32 RGB images of any number and size."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from forms import build
from torch import Tensor, nn
from twins import SharedHead
from written import (
    CLASSES,
    SIZE,
    WRITERS,
    Detecting,
    draw,
    expect_maps,
    open_detector,
    probe_notes,
    read_maps,
    script,
    to_onnx,
    trace,
)

from gdetkd_cli.assembly.detector import build_detector
from gdetkd_cli.commands.probe import run_probe
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import open_runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.recipe.schema import CheckpointDetector


class BoundBatch(Detecting):
    """A trace binds the boxes that it adds to the number of images."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = super().forward(images)
        count = int(images.shape[0])
        more = (torch.zeros(count, 1, 4), torch.zeros(count, 1, 1)[..., 0], torch.zeros(count, 1, 1)[..., 0].long())
        joined = [torch.cat(pair, dim=1) for pair in zip((boxes, scores, labels), more, strict=True)]
        return joined[0], joined[1], joined[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_a_batch_of_four(tmp_path: Path, form: str) -> None:
    model, path = build(BoundBatch), tmp_path / "model"
    WRITERS[form](model, path, (torch.rand(4, 3, *SIZE),))
    detector = open_detector(path)
    images = draw(6)

    assert detector.probed.call.name == "(4, 3, H, W) tensor"
    expected = expect_maps(model.inner.neck, torch.stack(images))
    for ours, theirs in zip(read_maps(detector, images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    found = detector.predict(images)
    assert len(found) == 6
    for one, image in zip(found, images, strict=True):
        assert one.boxes[0].tolist() == pytest.approx([0, 0, float(image.mean() * 64), 32], abs=1e-3)
        assert one.labels.tolist() == [1, 2]
    assert "takes 4 images at a time, so fewer are filled up with copies" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_half_precision(tmp_path: Path, form: str) -> None:
    model, path = build(SharedHead).half(), tmp_path / "model"
    WRITERS[form](model, path, (torch.rand(1, 3, *SIZE).half(),))
    detector, images = open_detector(path), draw(1)

    assert [level.stride for level in detector.levels] == [(8, 8), (16, 16), (32, 32)]
    expected = expect_maps(model.neck, torch.stack(images).half())
    for ours, theirs in zip(read_maps(detector, images), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=0.02, atol=0.02)
    assert "takes images as float16" in probe_notes(path)


def build_channels(count: int) -> nn.Module:
    model = build(SharedHead)
    model.neck.body.stem[0][0] = nn.Conv2d(count, 8, 7, 2, 3)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_grey_images_get_the_luminance(tmp_path: Path, form: str) -> None:
    model, path = build_channels(1), tmp_path / "model"
    WRITERS[form](model, path, (torch.rand(1, 1, *SIZE),))
    detector, images = open_detector(path), draw(1)

    red, green, blue = images[0]
    grey = (0.299 * red + 0.587 * green + 0.114 * blue)[None, None]
    for ours, theirs in zip(read_maps(detector, images), expect_maps(model.neck, grey), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert any("grey images" in note for note in probe_notes(path))


def test_luminance_of_blue_first_images() -> None:
    (image,) = draw(1)
    grey = ModelInput(grey=True).prepare(image)
    torch.testing.assert_close(ModelInput(grey=True, bgr=True).prepare(image), grey)
    mean = (0.4, 0.4, 0.4)
    torch.testing.assert_close(ModelInput(grey=True, mean=mean).prepare(image), grey - 0.4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_four_channels_are_refused_by_their_number(tmp_path: Path, form: str) -> None:
    model, path = build_channels(4), tmp_path / "model"
    WRITERS[form](model, path, (torch.rand(1, 4, *SIZE),))
    with pytest.raises(ModelError, match="images of 4 channels, which cannot be made from RGB"):
        run_probe(str(path))


class WholeLast(nn.Module):
    """Takes (N, H, W, 3) of whole numbers 0..255."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SharedHead()

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        found: Tensor = self.inner(images.permute(0, 3, 1, 2).float() / 255)
        return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["scripted", "exported", "onnx"])
def test_whole_numbers_channels_last(tmp_path: Path, form: str) -> None:
    model, path = build(WholeLast), tmp_path / "model"
    {**WRITERS, "scripted": script}[form](model, path, (torch.zeros(1, *SIZE, 3, dtype=torch.uint8),))
    detector, images = open_detector(path), draw(1)

    assert detector.probed.model_input.scale == 255
    rounded = (torch.stack(images) * 255).round() / 255
    for ours, theirs in zip(read_maps(detector, images), expect_maps(model.inner.neck, rounded), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert "takes images as uint8" in probe_notes(path)


class NoArgument(nn.Module):
    """Takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self) -> Tensor:
        found: Tensor = self.stem(torch.zeros(1, 3, 64, 64))
        return found


class NoForward(nn.Module):
    """Has another method alone."""

    @torch.jit.export
    def other(self, images: Tensor) -> Tensor:
        return images * 2


@pytest.mark.parametrize(
    ("twin", "reason"),
    [
        (NoArgument, r"no known way of calling this model .* expected at most 1 argument"),
        (NoForward, "no method forward"),
    ],
)
def test_a_script_that_takes_no_image(tmp_path: Path, twin: type[nn.Module], reason: str) -> None:
    path = tmp_path / "model.pt"
    script(build(twin), path, None)
    with pytest.raises(ModelError, match=reason):
        run_probe(str(path))


class BoundSize(nn.Module):
    """Its heads reshape to a number of cells that a trace fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SharedHead()

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.inner(images)
        return found.view(found.shape[0], 10, int(found.shape[2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "named"), [((160, 160), True), ((192, 256), True), ((320, 320), False)])
def test_a_free_graph_that_works_at_one_size(tmp_path: Path, size: tuple[int, int], named: bool) -> None:
    path = tmp_path / "model.onnx"
    axes = {"images": {0: "N", 2: "height", 3: "width"}}
    to_onnx(build(BoundSize), path, (torch.rand(1, 3, *size),), input_names=["images"], dynamic_axes=axes)
    if named:
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"imgsz": str(list(size))})
        onnx.save(model, path)
    assert open_runner(path, "onnx").size is None
    report = run_probe(str(path))
    assert report.size == size
    assert report.levels[0].stride == pytest.approx((8, 8), rel=1e-3)
    assert f"takes images of {size[0]} x {size[1]} pixels only, so images are fitted in" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
def test_a_named_size_that_a_graph_does_not_need(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    axes = {"images": {2: "height", 3: "width"}}
    to_onnx(build(SharedHead), path, (torch.rand(1, 3, *SIZE),), input_names=["images"], dynamic_axes=axes)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"imgsz": "[160, 160]"})
    onnx.save(model, path)
    assert run_probe(str(path)).size == (480, 640)


class BoundBoth(BoundBatch):
    """A trace binds its boxes to the number of images and to the size."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = super().forward(images)
        return boxes.view(int(boxes.shape[0]), int(boxes.shape[1]), 4), scores, labels


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_one_size_and_batch_teaches_images_of_any_size(tmp_path: Path) -> None:
    model, path = build(BoundBoth), tmp_path / "model.pt"
    trace(model, path, (torch.rand(2, 3, 320, 320),))
    spec = CheckpointDetector(arch="checkpoint", path=str(path), classes=list(CLASSES))
    built = build_detector(spec, CLASSES, 0, keep_classes=True)
    notes = [note.removeprefix(f"{path}: ") for note in built.notes]

    assert "takes images of 320 x 320 pixels only, so images are fitted in" in notes
    assert "takes 2 images at a time, so fewer are filled up with copies" in notes
    (one,) = built.detector.predict([torch.full((3, 160, 240), 0.5)])
    assert one.boxes[0].tolist() == pytest.approx([0, 0, 24, 24], abs=0.05)  # 32 pixels at 3/4, rounded


def test_a_file_of_any_size_is_opened_without_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    script(build(SharedHead), path, None)
    calls: list[object] = []
    monkeypatch.setattr(torch.jit.RecursiveScriptModule, "__call__", lambda *_: calls.append(_), raising=False)
    open_runner(path, "torchscript")
    assert not calls
