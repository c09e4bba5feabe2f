"""One contract for every detector of the catalogue: observed values equal the declared ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import CLASSES, SPECS, SSD300_CELLS, Spec, all_regions

from gdetkd_cli import portable
from gdetkd_cli.detectors import catalog, measure
from gdetkd_cli.detectors.protocol import Detector, Observation, View
from gdetkd_cli.structures import Batch, Detections, Regions


def test_the_whole_catalogue_is_here() -> None:
    assert set(portable.TORCHVISION_DETECTORS) <= set(SPECS)
    assert {spec.description.get("head") for spec in SPECS.values()} == {None, *portable.HEADS}


@dataclass(frozen=True)
class Case:
    spec: Spec
    detector: Detector

    @property
    def module(self) -> Any:
        return self.detector.module


@pytest.fixture(scope="module", params=list(SPECS))
def case(request: pytest.FixtureRequest, small: None) -> Case:
    spec = SPECS[request.param]
    torch.manual_seed(0)
    case = Case(spec, catalog.build(spec.description, CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        if max(spec.strides) <= 128 and "ssd" not in request.param:
            patch.setattr(measure, "SIDES", (128, 192))  # pixels; the SSDs need more
        assert case.detector.levels  # measured here, once
    return case


@pytest.fixture(scope="module")
def observed(case: Case, batch: Batch) -> Observation:
    case.module.train()
    torch.manual_seed(2)
    return case.detector.forward_train(batch)


@pytest.fixture(scope="module")
def extracted(case: Case, batch: Batch) -> Observation:
    return case.detector.extract_features(batch)


def assert_same_detections(first: list[Detections], second: list[Detections]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.labels, b.labels)


def test_declared_levels_are_the_observed_ones(case: Case, extracted: Observation) -> None:
    levels = case.detector.levels
    assert tuple(level.stride for level in levels) == tuple((float(s), float(s)) for s in case.spec.strides)
    assert tuple(level.channels for level in levels) == case.spec.channels
    if case.spec.centred_on_first_pixel:
        assert {level.offset for level in levels} == {(0.5, 0.5)}
    if case.spec.description.get("name") == "ssd300_vgg16":
        # A 2 x 2 pool moves the centre by half a cell, a convolution without padding by its margin.
        assert [level.offset[0] for level in levels] == [4, 8, 8, 8, 72, 136]

    pyramid = extracted.pyramid
    assert pyramid.levels == levels
    expected = [tuple(math.ceil(side / stride) for side in pyramid.frame.size) for stride in case.spec.strides]
    if case.spec.description.get("name") == "ssd300_vgg16":
        expected = [(cells, cells) for cells in SSD300_CELLS]
    assert [tuple(m.shape) for m in pyramid.maps] == [
        (2, channels, *cells) for channels, cells in zip(case.spec.channels, expected, strict=True)
    ]


def test_observing_changes_nothing(case: Case, batch: Batch) -> None:
    """The losses equal the module's own to the last bit, and no hook stays."""
    case.module.train()
    torch.manual_seed(1)
    expected = case.module(batch.images, [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets])
    torch.manual_seed(1)
    losses = case.detector.forward_train(batch).losses

    torch.manual_seed(1)
    plain = case.detector.forward_train(batch, candidates=False)

    assert losses.keys() == expected.keys() == plain.losses.keys()
    assert all(torch.equal(plain.losses[name], value) for name, value in expected.items())
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert all(loss.requires_grad and torch.isfinite(loss) for loss in losses.values())
    assert case.module.training
    assert not any(module._forward_hooks for module in case.module.modules())


def test_looking_is_the_backbone_in_evaluation_mode(case: Case, batch: Batch) -> None:
    case.module.train()
    before = {name: value.clone() for name, value in case.module.state_dict().items()}
    seen = case.detector.extract_features(batch)
    assert case.module.training  # as it was
    assert all(torch.equal(value, before[name]) for name, value in case.module.state_dict().items())
    assert seen.losses == {}
    assert seen.candidates is None

    case.module.eval()
    images, _ = case.module.transform(batch.images)
    for ours, theirs in zip(seen.pyramid.maps, case.module.backbone(images.tensors).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert seen.pyramid.frame.size == tuple(images.tensors.shape[-2:])
    assert not case.module.training


def test_candidates_lie_in_their_images(case: Case, batch: Batch, observed: Observation) -> None:
    candidates = observed.candidates
    assert candidates is not None

    assert candidates.sampled == (case.detector.family == "two-stage")
    assert not candidates.boxes.requires_grad
    assert candidates.image_index.dtype == torch.int64
    assert (candidates.image_index.diff() >= 0).all()
    assert candidates.image_index.unique().tolist() == [0, 1]
    for i, image in enumerate(batch.images):
        boxes = candidates.boxes[candidates.image_index == i]
        limit = torch.tensor([image.shape[2], image.shape[1]])
        assert (boxes >= -1e-3).all()
        assert (boxes[:, 2:] <= limit + 1e-3).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:].amax(dim=0) > limit / 2).all()  # image pixels, not smaller ones


@pytest.mark.parametrize("which", ["observed", "extracted"])
def test_views_have_their_shapes(case: Case, which: str, request: pytest.FixtureRequest) -> None:
    seen: Observation = request.getfixturevalue(which)
    boxes = torch.tensor([[4.0, 6, 30, 38], [-3, 5, 20, 70], [8, 8, 9, 9], [0, 0, 40, 60], [2, 2, 38, 20]])
    outputs = len(CLASSES) + 1
    two_stage = case.detector.family == "two-stage"
    several = len(set(case.spec.channels)) > 1
    assert case.detector.embedding_channels == case.spec.embedding_channels
    case.module.eval()  # a normalised box head cannot train on no region

    every: list[View] = ["pooled", "embedding", "predictions", "level"]
    for needs in (*([one] for one in every), every):
        for count in (0, 5):
            some = Regions(boxes[:count], torch.tensor([0, 0, 0, 1, 1])[:count], torch.full((count,), -1))
            view = case.detector.region_outputs(seen, some, frozenset(needs))
            if "pooled" in needs:
                assert view.pooled is not None
                assert view.pooled.shape == (count, max(case.spec.channels), 7, 7)
            if "embedding" in needs:
                assert view.embedding is not None
                assert view.embedding.shape == (count, case.spec.embedding_channels)
            if "level" in needs:
                assert view.level is not None
                assert view.level.shape == (count,) and set(view.level.tolist()) <= set(range(len(case.spec.channels)))
            if "predictions" in needs and two_stage:
                assert view.class_logits is not None
                assert view.box_deltas is not None
                assert view.class_logits.shape == (count, outputs)
                assert view.box_deltas.shape == (count, outputs, 4)
            if not two_stage:
                assert view.class_logits is None
                assert view.box_deltas is None
            assert (view.pooled_channels is not None) == (several and "pooled" in needs)
            if view.pooled is not None and view.pooled_channels is not None:
                assert set(view.pooled_channels.tolist()) <= set(case.spec.channels)
                for features, channels in zip(view.pooled, view.pooled_channels, strict=True):
                    assert (features[channels:] == 0).all()


def test_a_two_stage_regions_level_is_the_one_it_is_pooled_from(case: Case, extracted: Observation) -> None:
    if case.detector.family != "two-stage":
        return
    sides = 2 ** torch.linspace(1.3, 5.4, 40)
    boxes = torch.stack([torch.zeros(40), torch.zeros(40), sides, sides], dim=1)
    regions = Regions(boxes, torch.zeros(40, dtype=torch.int64), torch.full((40,), -1))
    level = case.detector.region_outputs(extracted, regions, frozenset({"level"})).level
    case.detector.region_outputs(extracted, regions, frozenset({"pooled"}))  # sets torchvision's mapper up
    pool = case.module.roi_heads.box_roi_pool
    if len(pool.featmap_names) == 1:
        expected = torch.zeros(40, dtype=torch.int64)
    else:
        expected = pool.map_levels([extracted.pyramid.frame.to_model(boxes, regions.image_index)])
    assert level is not None and torch.equal(level, expected)


def test_candidates_equal_their_heads_outputs(case: Case, observed: Observation) -> None:
    """A two-stage head already ran on its candidates; reading the same boxes from the pyramid gives the same."""
    assert observed.candidates is not None
    case.module.train()
    two_stage = case.detector.family == "two-stage"
    needs: frozenset[View] = frozenset({"embedding", "predictions"} if two_stage else {"embedding"})
    own = case.detector.region_outputs(observed, all_regions(observed.candidates, own=True), needs)

    assert own.embedding is not None
    assert own.embedding.shape == (len(observed.candidates.boxes), case.spec.embedding_channels)
    assert own.embedding.requires_grad
    if two_stage:
        anew = case.detector.region_outputs(observed, all_regions(observed.candidates, own=False), needs)
        for ours, theirs in (
            (own.embedding, anew.embedding),
            (own.class_logits, anew.class_logits),
            (own.box_deltas, anew.box_deltas),
        ):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_predictions_are_in_each_images_own_pixels(case: Case, batch: Batch) -> None:
    case.module.train()
    found = case.detector.predict(batch.images)
    assert case.module.training  # as it was
    with torch.no_grad():
        raw = case.module.eval()(batch.images)
    objects = [r["labels"] > 0 for r in raw]  # an untrained RetinaNet or FCOS finds background, too
    assert_same_detections(
        found, [Detections(r["boxes"][o], r["scores"][o], r["labels"][o]) for r, o in zip(raw, objects, strict=True)]
    )
    for image, one in zip(batch.images, found, strict=True):
        limit = torch.tensor([image.shape[2], image.shape[1]])
        assert len(one.boxes) > 0
        assert (one.boxes >= 0).all()
        assert (one.boxes[:, 2:] <= limit + 1e-3).all()
        assert (one.scores.diff() <= 0).all()
        assert set(one.labels.tolist()) <= {1, 2}
        assert not one.boxes.requires_grad


def test_a_saved_detector_is_the_same(case: Case, batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    catalog.save(path, case.detector, case.spec.description)
    found = catalog.load(path)
    loaded, description = found.detector, found.description
    path.unlink()  # up to 100 MB, which pytest would keep

    assert description == case.spec.description
    assert loaded.class_names == CLASSES
    assert not loaded.module.training
    image = batch.images[:1]
    assert_same_detections(loaded.predict(image), case.detector.predict(image))
