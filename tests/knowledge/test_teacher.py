"""A stored teacher teaches what the live one teaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import PAIRS, TinyDetector, forward, make_distiller, terms_of
from query_models import make_config
from torch import Tensor, nn
from twins import SharedHead

from gdetkd_cli.detectors import transformers
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.errors import KnowledgeError, ModelError, PairError
from gdetkd_cli.knowledge.store import DiskStore, MemoryStore, Store
from gdetkd_cli.knowledge.teacher import remember, to_pixels
from gdetkd_cli.probing.formats.runner import ModuleRunner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.structures import Batch, ImageView, LossReport, Regions, Target, name_view

SIZE = (64, 96)


def fail(note: str) -> None:
    raise AssertionError(note)


def memory() -> MemoryStore:
    return MemoryStore(10**9, fail)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return memory() if request.param == "memory" else DiskStore(tmp_path / "views", 10**9, fail)


def scene(*sizes: tuple[int, int]) -> Batch:
    """Images of these sizes, in 255 steps of brightness, with two objects each."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    boxes = torch.tensor([[4.0, 6, 30, 38], [20, 10, 38, 46]])
    return Batch(
        images=[image.float() / 255 for image in pixels],
        targets=[Target(boxes=boxes, labels=torch.tensor([1, 3])) for _ in sizes],
        image_ids=torch.arange(len(sizes)),
        views=tuple(ImageView(name_view(image)) for image in pixels),
    )


class Counted:
    """Counts the images on which a detector runs."""

    def __init__(self, detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        extract = detector.extract_features

        def count(batch: Batch) -> Observation:
            self.images += len(batch)
            return extract(batch)

        monkeypatch.setattr(detector, "extract_features", count)


def compare(live: LossReport, stored: LossReport) -> None:
    assert live.parts.keys() == stored.parts.keys()
    for name, value in live.parts.items():
        torch.testing.assert_close(stored.parts[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_losses_equal_the_live_teachers(
    teacher: str, student: str, tiny_detector: TinyDetector, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every term; the first time the teacher runs, later it does not."""
    batch, names = scene(SIZE, SIZE), terms_of(teacher, student)

    def report(frozen: Detector) -> LossReport:
        return forward(make_distiller(tiny_detector(student), frozen, names), batch)

    frozen = tiny_detector(teacher, seed=1)
    live = report(frozen)
    counted = Counted(frozen, monkeypatch)
    first, later = report(remember(frozen, store)), report(remember(frozen, store))

    compare(live, first)
    compare(first, later)
    assert all(torch.equal(first.parts[name], later.parts[name]) for name in first.parts)
    assert counted.images == 2


def test_a_teacher_that_runs_channels_last(tiny_detector: TinyDetector, store: Store) -> None:
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.to(memory_format=torch.channels_last)
    batch = scene(SIZE)
    live = frozen.extract_features(batch).pyramid.maps
    for _ in range(2):
        stored = remember(frozen, store).extract_features(batch).pyramid.maps
        for ours, theirs in zip(stored, live, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_losses_of_a_torchscript_teacher(tiny_detector: TinyDetector, store: Store) -> None:
    torch.manual_seed(0)
    script = torch.jit.trace(SharedHead().eval(), torch.rand(1, 3, 96, 128))
    frozen = ProbedDetector(
        runner=ModuleRunner(script), source="m.pt", kind="torchscript", model_input=ModelInput(), size=(96, 128)
    )
    batch = scene((96, 128), (96, 128))

    def report(teacher: Detector) -> LossReport:
        return forward(make_distiller(tiny_detector("retinanet"), teacher, ("sgfi",)), batch)

    live = report(frozen)
    compare(live, report(remember(frozen, store)))
    compare(live, report(remember(frozen, store)))


@pytest.mark.parametrize("name", ["rt_detr", "detr"])
def test_outputs_of_a_teacher_with_queries(name: str, store: Store) -> None:
    torch.manual_seed(0)
    frozen = transformers.build(transformers.describe_fresh(make_config(name), SIZE), ("a", "b", "c"))
    frozen.module.eval()
    batch = scene(SIZE, SIZE)
    regions = Regions(
        boxes=torch.tensor([[4.0, 6, 30, 38], [20, 10, 38, 46]]),
        image_index=torch.tensor([0, 1]),
        candidate=torch.tensor([-1, -1]),
    )

    def look(teacher: Detector) -> list[Tensor]:
        view = teacher.region_outputs(
            teacher.extract_features(batch), regions, frozenset({"pooled", "embedding", "predictions"})
        )
        assert view.pooled is not None
        assert view.embedding is not None
        assert view.queries is not None
        return [view.pooled, view.embedding, view.queries.class_logits, view.queries.boxes]

    with torch.no_grad():
        live = look(frozen)
    for _ in range(2):
        for ours, theirs in zip(look(remember(frozen, store)), live, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", ["faster-rcnn", "fcos"])
def test_images_of_unlike_sizes_are_seen_one_by_one(head: str, tiny_detector: TinyDetector, store: Store) -> None:
    """A level holds each image's own map, as if it were alone in the batch, and zeros beside it."""
    frozen = tiny_detector(head, seed=1)
    frozen.module.eval()
    batch = scene((48, 64), (64, 40))
    seen = remember(frozen, store).extract_features(batch)

    for i in range(2):
        alone = frozen.extract_features(Batch(batch.images[i : i + 1], [], batch.image_ids[i : i + 1]))
        torch.testing.assert_close(seen.pyramid.frame.scale[i], alone.pyramid.frame.scale[0])
        for ours, theirs in zip(seen.pyramid.maps, alone.pyramid.maps, strict=True):
            height, width = theirs.shape[-2:]
            torch.testing.assert_close(ours[i, :, :height, :width], theirs[0], rtol=1e-3, atol=1e-4)
            assert not ours[i, :, height:].any()
            assert not ours[i, :, :, width:].any()


def test_a_view_does_not_depend_on_the_batch_to_the_last_bit(tiny_detector: TinyDetector) -> None:
    """A resumed run computes a view beside other ones than the run before, and is still the same run."""
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()
    batch, together, alone = scene(*[SIZE] * 8), memory(), memory()
    remember(frozen, together).extract_features(batch)
    for i in range(8):
        one = Batch(batch.images[i : i + 1], [], batch.image_ids[i : i + 1], batch.views[i : i + 1])
        remember(frozen, alone).extract_features(one)
    for view in batch.views:
        first, second = together.read(view.name), alone.read(view.name)
        assert first is not None and second is not None
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_sees_the_view_and_not_the_batch(tiny_detector: TinyDetector) -> None:
    """The loader jitters and resizes the image; the teacher still sees the data set's, and boxes meet its cells."""
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()
    plain = scene((48, 64))
    pixels = to_pixels(plain.images[0])
    jittered = replace(
        plain,
        images=[torch.rand(3, 96, 128)],  # twice as large
        views=(ImageView(name_view(pixels), pixels),),
    )
    seen, expected = (remember(frozen, memory()).extract_features(batch) for batch in (jittered, plain))

    assert all(torch.equal(a, b) for a, b in zip(seen.pyramid.maps, expected.pyramid.maps, strict=True))
    box = torch.tensor([[8.0, 12, 60, 76]])
    index = torch.tensor([0])
    torch.testing.assert_close(seen.pyramid.frame.to_model(box, index), expected.pyramid.frame.to_model(box / 2, index))
    ours, theirs = (
        frozen.region_outputs(
            observation, Regions(boxes, index, torch.tensor([-1])), frozenset({"pooled", "embedding", "predictions"})
        )
        for observation, boxes in ((seen, box), (expected, box / 2))
    )
    for name in ("pooled", "embedding", "class_logits", "box_deltas"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_a_batch_without_views_is_named_by_its_pixels(
    tiny_detector: TinyDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that can run does not store such images, because they are no training images."""
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()
    counted, kept, batch = Counted(frozen, monkeypatch), memory(), scene(SIZE)
    without = replace(batch, views=())
    remember(frozen, kept).extract_features(without)
    assert kept.used == 0
    expected = remember(frozen, kept).extract_features(batch)
    seen = remember(frozen, kept, live=False).extract_features(without)

    assert counted.images == 2
    assert all(torch.equal(a, b) for a, b in zip(seen.pyramid.maps, expected.pyramid.maps, strict=True))


def test_int8_halves_the_size(tiny_detector: TinyDetector) -> None:
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()
    batch, stores = scene(SIZE), (memory(), memory())
    with torch.no_grad():
        exact = frozen.extract_features(batch).pyramid.maps
    half, small = (
        remember(frozen, kept, int8=int8).extract_features(batch).pyramid.maps
        for kept, int8 in zip(stores, (False, True), strict=True)
    )

    assert stores[1].used < 0.6 * stores[0].used
    for true, rough, rougher in zip(exact, half, small, strict=True):
        step = true.abs().amax(dim=(2, 3), keepdim=True) / 127
        assert bool(((rougher - true).abs() <= step / 2 + 1e-6).all())
        assert float((rough - true).abs().max()) <= float(true.abs().max()) * 2**-11


def test_a_full_memory_loses_nothing(tiny_detector: TinyDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first images stay, the teacher runs for the others, and there is one note."""
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()
    whole = memory()
    remember(frozen, whole).extract_features(scene(SIZE))
    counted, notes = Counted(frozen, monkeypatch), []
    teacher = remember(frozen, MemoryStore(int(whole.used * 1.5), notes.append))
    batch = scene(SIZE, SIZE, SIZE)
    first, again = teacher.extract_features(batch), teacher.extract_features(batch)

    assert all(torch.equal(a, b) for a, b in zip(first.pyramid.maps, again.pyramid.maps, strict=True))
    assert counted.images == 3 + 2
    assert len(notes) == 1
    assert "distill.teacher_cache_gb" in notes[0]


def test_features_of_another_form_are_refused(tiny_detector: TinyDetector) -> None:
    kept, batch = memory(), scene(SIZE)
    kept.add(batch.views[0].name, {"level.0": torch.zeros(1, 2, 2)})
    with pytest.raises(KnowledgeError, match="other parts than the teacher's 5 levels"):
        remember(tiny_detector("fcos"), kept, live=False).extract_features(batch)


def test_values_that_float16_cannot_hold_are_an_error(tiny_detector: TinyDetector) -> None:
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()
    with torch.no_grad():
        frozen.module.backbone.fpn.layer_blocks[0][0].bias.fill_(1e5)  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match=r"level backbone\.0 has values up to 1e\+05, but float16 ends at 65504"):
        remember(frozen, memory()).extract_features(scene(SIZE))


@pytest.mark.parametrize("int8", [False, True])
def test_values_that_are_not_finite_are_not_stored(tiny_detector: TinyDetector, int8: bool) -> None:
    frozen, kept = tiny_detector("faster-rcnn", seed=1), memory()
    frozen.module.eval()
    assert len(frozen.levels) == 5  # measured before the harm, which one image may do as well
    with torch.no_grad():
        frozen.module.backbone.fpn.layer_blocks[0][0].bias.fill_(float("nan"))  # type: ignore[union-attr, index]
    with pytest.raises(ModelError, match=r"level backbone\.0 has NaN or infinity in an image"):
        remember(frozen, kept, int8=int8).extract_features(scene(SIZE))
    assert kept.used == 0


def test_a_detector_that_cannot_be_rebuilt_is_refused(tiny_detector: TinyDetector) -> None:
    frozen = tiny_detector("faster-rcnn", seed=1)
    frozen.module.eval()

    def recall(batch: Batch, pyramid: Any, kept: Any) -> Observation:
        return Observation({}, pyramid, None)

    vars(frozen)["recall"] = recall
    with pytest.raises(PairError, match="cannot rebuild its TwoStageObservation"):
        remember(frozen, memory()).extract_features(scene(SIZE))
    with pytest.raises(PairError, match="derive it from"):
        remember(nn.Identity(), memory())  # type: ignore[arg-type]


def test_a_teacher_that_cannot_run_names_what_is_missing(tiny_detector: TinyDetector) -> None:
    teacher = remember(tiny_detector("fcos"), memory(), live=False, source="runs/knowledge")
    with pytest.raises(KnowledgeError, match=r"runs/knowledge knows nothing of 2 of the images"):
        teacher.extract_features(scene(SIZE, SIZE))
    with pytest.raises(KnowledgeError, match=r"no detections of an image of 96 x 64 pixels"):
        teacher.predict(scene(SIZE).images)
