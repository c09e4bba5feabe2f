"""Inputs other than float32 RGB images: half precision, grey, whole numbers, fixed batches, and second inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from forms import build
from torch import Tensor, nn
from twins import SharedHead

from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import detect_kind, open_runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.structures import Batch

SIZE = (96, 128)
CLASSES = ("a", "b", "c")


def script(model: nn.Module, path: Path, _: Any) -> None:
    torch.jit.script(model).save(str(path))


def trace(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> None:
    torch.jit.trace(model, example, check_trace=False).save(str(path))


def freeze(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> None:
    torch.jit.freeze(torch.jit.trace(model, example, check_trace=False)).save(str(path))


def export(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> None:
    torch.export.save(torch.export.export(model, example), path)


def to_onnx(model: nn.Module, path: Path, example: tuple[Tensor, ...], **options: Any) -> None:
    torch.onnx.export(model, example, path, dynamo=False, **options)


WRITERS: dict[str, Callable[..., None]] = {"traced": trace, "frozen": freeze, "exported": export, "onnx": to_onnx}


def open_detector(path: Path, model_input: ModelInput | None = None) -> ProbedDetector:
    return ProbedDetector(
        runner=open_runner(path, detect_kind(path)),
        source=str(path),
        kind=detect_kind(path),
        model_input=model_input or ModelInput(),
        size=SIZE,
        class_names=CLASSES,
    )


def draw(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *SIZE, generator=generator) for _ in range(count)]


def read_maps(detector: ProbedDetector, images: list[Tensor]) -> tuple[Tensor, ...]:
    return detector.extract_features(Batch(images=images, targets=[], image_ids=torch.arange(len(images)))).pyramid.maps


@torch.no_grad()
def expect_maps(neck: nn.Module, images: Tensor) -> list[Tensor]:
    return neck(images)


def probe_notes(path: Path, options: ProbeOptions | None = None) -> list[str]:
    notes: list[str] = []

    def keep(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    run_probe(str(path), options or ProbeOptions(size=SIZE), observer=keep)
    return notes


class Detecting(nn.Module):
    """Boxes of each cell, whose right corner is the image's mean times 64; two cells have a score, of classes 0, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SharedHead()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.decode(images, images.mean(dim=(1, 2, 3)) * 64)

    def decode(self, images: Tensor, corner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = self.inner(images).transpose(1, 2)
        zeros = cells[..., 0] * 0
        number = (zeros + 1).cumsum(dim=1)
        boxes = torch.stack([zeros, zeros, zeros + corner[:, None], zeros + 32], dim=2)
        return boxes, (number == 1) * 0.9 + (number == 2) * 0.5, (number > 1).long()


class BoundBatch(Detecting):
    """A trace binds the boxes that it adds to the number of images."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = super().forward(images)
        count = int(images.shape[0])
        more = (torch.zeros(count, 1, 4), torch.zeros(count, 1, 1)[..., 0], torch.zeros(count, 1, 1)[..., 0].long())
        joined = [torch.cat(pair, dim=1) for pair in zip((boxes, scores, labels), more, strict=True)]
        return joined[0], joined[1], joined[2]


# ------------------------------------------------------------------------------------------------------ fixed batches


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


# ---------------------------------------------------------------------------------------------------- half precision


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


# ----------------------------------------------------------------------------------------------------------- channels


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


# ------------------------------------------------------------------------------------------------------ whole numbers


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


# ------------------------------------------------------------------------------------------------------ second inputs


class SecondRows(Detecting):
    """The right corner of its boxes shows the second input: its first number and a hundredth of its second."""

    def forward(self, images: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        rows = second.to(images.dtype).flatten(1)
        return self.decode(images, rows[:, 0] + rows[:, 1] / 100)


def rename(name: str) -> type[nn.Module]:
    """The same network, whose second argument has this name."""
    source = f"def forward(self, images, {name}):\n    return SecondRows.forward(self, images, {name})\n"
    space: dict[str, Any] = {"SecondRows": SecondRows}
    exec(source, space)  # noqa: S102  # the names of arguments cannot be made otherwise
    return type("Renamed", (SecondRows,), {"forward": space["forward"]})


ROWS = {
    "im_shape": (96, 128),
    "scale_factor": (1, 1),
    "im_info": (96, 128, 1),
    "orig_target_sizes": (128, 96),  # its boxes reach beyond the image and are clipped
    "image_shape": (96, 128),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", ROWS)
def test_second_inputs_of_a_usual_name(tmp_path: Path, form: str, name: str) -> None:
    row = ROWS[name]
    example = (torch.rand(1, 3, *SIZE), torch.tensor([row], dtype=torch.float32))
    path = tmp_path / "model"
    options = {"input_names": ["images", name]} if form == "onnx" else {}
    WRITERS[form](build(rename(name)), path, example, **options)

    (one,) = open_detector(path).predict(draw(1))
    assert one.boxes[0].tolist() == pytest.approx([0, 0, min(row[0] + row[1] / 100, 128), 32])
    assert f"also passes {name} = {row}" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_a_mask_of_the_images_pixels(tmp_path: Path, form: str) -> None:
    example = (torch.rand(1, 3, *SIZE), torch.ones(1, *SIZE, dtype=torch.int64))
    path = tmp_path / "model"
    options = {"input_names": ["pixel_values", "pixel_mask"]} if form == "onnx" else {}
    WRITERS[form](build(rename("pixel_mask")), path, example, **options)
    (one,) = open_detector(path).predict(draw(1))
    assert one.boxes[0].tolist() == pytest.approx([0, 0, 1.01, 32])
    assert "also passes pixel_mask = ones" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
def test_inputs_in_paddles_order_and_for_several_images(tmp_path: Path) -> None:
    class Paddle(SecondRows):
        def forward(self, im_shape: Tensor, image: Tensor, scale_factor: Tensor) -> Any:  # type: ignore[override]
            return super().forward(image, im_shape * scale_factor)

    path = tmp_path / "model.onnx"
    names = ["im_shape", "image", "scale_factor"]
    rows = torch.ones(1, 2)
    to_onnx(
        build(Paddle),
        path,
        (rows, torch.rand(1, 3, *SIZE), rows),
        input_names=names,
        dynamic_axes={name: {0: "N"} for name in names},
    )
    found = open_detector(path).predict(draw(2))
    assert [one.boxes[0].tolist() for one in found] == [pytest.approx([0, 0, 97.28, 32])] * 2
    assert "also passes im_shape = (96, 128), scale_factor = (1, 1)" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
def test_a_mask_given_by_name_in_an_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    given = {"images": torch.rand(1, 3, *SIZE), "pixel_mask": torch.ones(1, *SIZE)}
    torch.export.save(torch.export.export(build(rename("pixel_mask")), (), given), path)
    (one,) = open_detector(path).predict(draw(1))
    assert one.boxes[0].tolist() == pytest.approx([0, 0, 1.01, 32])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_other_inputs_are_refused_by_name(tmp_path: Path, form: str) -> None:
    example = (torch.rand(1, 3, *SIZE), torch.ones(1, 2))
    path = tmp_path / "model"
    options = {"input_names": ["images", "prompts"]} if form == "onnx" else {}
    WRITERS[form](build(rename("prompts")), path, example, **options)
    with pytest.raises(ModelError, match=r"also takes prompts, whose value gdetkd does not know; export"):
        run_probe(str(path))


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


# -------------------------------------------------------------------------------------------------------- fixed sizes


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


def test_a_file_of_any_size_is_opened_without_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    script(build(SharedHead), path, None)
    calls: list[object] = []
    monkeypatch.setattr(torch.jit.RecursiveScriptModule, "__call__", lambda *_: calls.append(_), raising=False)
    open_runner(path, "torchscript")
    assert not calls
