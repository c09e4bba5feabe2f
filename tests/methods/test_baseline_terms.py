"""Terms of other methods on an observed pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gdetkd_cli.detectors.protocol import Observation, RegionView
from gdetkd_cli.errors import PairError
from gdetkd_cli.methods.base import ObservedPair
from gdetkd_cli.methods.baselines.cwd import CWDTerm
from gdetkd_cli.methods.baselines.fgd import FGDTerm, FGDWeights, Scale, focal_losses, object_masks
from gdetkd_cli.methods.baselines.fitnet import FitNetTerm
from gdetkd_cli.methods.baselines.gt_mask import GTMaskTerm
from gdetkd_cli.methods.baselines.logit import LogitTerm
from gdetkd_cli.methods.baselines.maps import MapSettings
from gdetkd_cli.methods.baselines.pkd import PKDTerm
from gdetkd_cli.methods.baselines.roi_imitation import RoIImitationTerm
from gdetkd_cli.structures import Batch, Frame, LevelSpec, Pyramid, Regions, Target

STUDENT, TEACHER = [5, 5], [6, 6, 6]
BOXES = [torch.tensor([[4.0, 4, 28, 20], [1, 0, 62, 62]]), torch.zeros(0, 4)]
TERMS: dict[type[nn.Module], dict[str, Any]] = {
    FitNetTerm: {},
    GTMaskTerm: {"share": 0.5, "anchors": [torch.full((1, 2), 4.0)] * 2},
    PKDTerm: {},
    CWDTerm: {"tau": 1.0},
    FGDTerm: {
        "weights": FGDWeights(temperature=0.5, objects=1e-3, background=5e-4, attention=1e-3, relation=5e-6),
        "published_cells": 1000,
    },
}
SETTINGS = MapSettings(STUDENT, TEACHER, counted=[True, True])
EQUAL = MapSettings([6, 6], [6, 6], counted=[True, True])
FINE = MapSettings(STUDENT, TEACHER, counted=[True, False])


def make_observation(channels: list[int], strides: list[int], seed: int, *, grad: bool = False) -> Observation:
    """Two images of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, c, 64 // s, 64 // s, generator=generator) for c, s in zip(channels, strides, strict=True)]
    levels = [
        LevelSpec(str(s), c, (s, s), (s / 2, s / 2), (64 // s, 64 // s)) for c, s in zip(channels, strides, strict=True)
    ]
    frame = Frame(scale=torch.ones(2, 2), shift=torch.zeros(2, 2), size=(64, 64))
    made = tuple(m.requires_grad_(grad) for m in maps)
    return Observation(losses={}, pyramid=Pyramid(made, tuple(levels), frame), candidates=None)


def make_pair(**views: RegionView) -> ObservedPair:
    targets = [Target(boxes, torch.ones(len(boxes), dtype=torch.int64)) for boxes in BOXES]
    index = torch.tensor([0, 0, 1])
    return ObservedPair(
        regions=Regions(torch.tensor([[0.0, 0, 9, 9]] * 3), index, torch.full((3,), -1)),
        image_ids=index,
        batch=Batch([torch.zeros(3, 64, 64)] * 2, targets, torch.tensor([1, 2])),
        student_seen=make_observation(STUDENT, [4, 8], 0, grad=True),
        teacher_seen=make_observation(TEACHER, [4, 8, 16], 1),
        student_view=views.get("student", RegionView()),
        teacher_view=views.get("teacher", RegionView()),
    )


def make_term(term: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return term(SETTINGS, **TERMS[term])


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.__name__)
def test_every_level_gets_a_gradient_and_the_term_can_be_learnt(term: type[nn.Module]) -> None:
    observed, module = make_pair(), make_term(term)
    maps = observed.student_seen.pyramid.maps
    first = module(observed)
    assert first.shape == ()
    for gradient in torch.autograd.grad(first, maps):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    free = [m.detach().clone().requires_grad_() for m in maps]
    held = ObservedPair(**(vars(observed) | {"student_seen": replace_maps(observed.student_seen, free)}))
    optimizer = torch.optim.Adam([*free, *module.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(held)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.6 * float(first.detach())


def replace_maps(observation: Observation, maps: list[Tensor]) -> Observation:
    pyramid = observation.pyramid
    return Observation(losses={}, pyramid=Pyramid(tuple(maps), pyramid.levels, pyramid.frame), candidates=None)


def test_near_objects_only_their_cells_get_a_gradient() -> None:
    observed = make_pair()
    fine, _ = torch.autograd.grad(make_term(GTMaskTerm)(observed), observed.student_seen.pyramid.maps)
    moved = fine.abs().sum(dim=1) > 0
    assert moved[0].any()
    assert not moved[0].all()
    assert not moved[1].any()  # this image has no object


@pytest.mark.parametrize("term", [t for t in TERMS if t is not PKDTerm], ids=lambda term: term.__name__)
def test_with_the_teachers_head_nothing_stands_between_the_features(term: type[nn.Module]) -> None:
    """Equal features give loss 0 at any distance from 0, but not with a fresh adapter or other statistics."""
    torch.manual_seed(0)
    both = make_observation([6, 6], [4, 8], 3)
    far = replace_maps(both, [100 + 7 * m for m in both.pyramid.maps])
    observed = ObservedPair(**(vars(make_pair()) | {"student_seen": far, "teacher_seen": far}))
    losses = [float(term(replace(EQUAL, same_space=same), **TERMS[term])(observed).detach()) for same in (True, False)]
    assert losses[0] == pytest.approx(0, abs=1e-5)  # FGD's context blocks add nothing at the start
    assert losses[1] > 10 * abs(losses[0])


def test_inside_boxes_only_their_cells_get_a_gradient() -> None:
    """The first image has a small object on the fine level and a large one on the coarse level."""
    observed = make_pair()
    asked = []

    def assign(seen: Observation, regions: Regions) -> Tensor:
        asked.append(regions)
        return torch.tensor([0, 1])

    term = GTMaskTerm(SETTINGS, anchors=[], share=0.5, assign=assign)
    fine, coarse = torch.autograd.grad(term(observed), observed.student_seen.pyramid.maps)
    assert torch.equal(asked[0].boxes, BOXES[0])
    assert asked[0].image_index.tolist() == [0, 0]
    moved = [level.abs().sum(dim=1) > 0 for level in (fine, coarse)]
    expected = [torch.zeros(2, 16, 16, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)]
    expected[0][0, 1:5, 1:7] = True  # 4 to 28 by 4 to 20 pixels, cells of 4
    expected[1][0] = True  # 1 to 62 by 0 to 62: every centre of a cell of 8
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.__name__)
def test_levels_that_do_not_count_are_left_out(term: type[nn.Module]) -> None:
    """They have no gradient and no weights, for which several processes would wait."""
    torch.manual_seed(0)
    alone = term(FINE, **TERMS[term])
    observed = make_pair()
    fine, coarse = observed.student_seen.pyramid.maps
    alone(observed).backward()
    assert fine.grad is not None
    assert fine.grad.abs().sum() > 0
    assert coarse.grad is None
    assert all(parameter.grad is not None for parameter in alone.parameters())


def test_objects_of_a_level_that_does_not_count_belong_to_the_one_before() -> None:
    term = GTMaskTerm(FINE, anchors=[], share=0.5, assign=lambda seen, regions: torch.tensor([1, 1]))
    masks = term.build_masks(make_pair())
    assert list(masks) == [0]
    assert masks[0][0].sum() == 16 * 16  # the large object's box covers the image
    assert not masks[0][1].any()


@pytest.mark.parametrize(("scaled", "standardized"), [(True, True), (False, True), (True, False), (False, False)])
def test_fgd_against_its_equations(scaled: bool, standardized: bool) -> None:
    """With equal channels there is no adapter, and fresh context blocks add 0."""
    weights = FGDWeights(temperature=0.5, objects=2.0, background=3.0, attention=5.0, relation=7.0)
    observed = ObservedPair(**(vars(make_pair()) | {"student_seen": make_observation([6, 6], [4, 8], 0)}))
    term = FGDTerm(
        MapSettings([6, 6], TEACHER, counted=[True, True]),
        weights=weights,
        published_cells=1000 if scaled else None,
        standardized=standardized,
    )
    expected = 0.0
    for student, teacher, stride in zip(
        observed.student_seen.pyramid.maps, observed.teacher_seen.pyramid.maps, (4, 8), strict=False
    ):
        target = (teacher - teacher.mean()) / teacher.std(unbiased=False) if standardized else teacher
        inside = torch.ones(2, 64 // stride, 64 // stride, dtype=torch.bool)
        masks = object_masks([boxes / stride for boxes in BOXES], inside)
        scale = Scale(256 / 6, 1000 / (16**2 + 8**2)) if scaled else Scale()
        objects, background, attention = focal_losses(student, target, inside, *masks, 0.5, scale)
        squares = (student - target).square().sum() / 2 * scale.channels * scale.cells
        expected += float(2 * objects + 3 * background + 5 * attention + 7 * squares)
    assert float(term(observed).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("term", [FitNetTerm, PKDTerm, CWDTerm, FGDTerm], ids=lambda term: term.__name__)
def test_padding_beside_a_larger_image_changes_nothing(term: type[nn.Module]) -> None:
    """Both images are 64 x 48 pixels, alone or with 80 more columns of whatever the networks make of padding."""

    def compute_loss(padding: int) -> float:
        observed = make_pair()
        changed: dict[str, Any] = {"batch": replace(observed.batch, images=[torch.zeros(3, 64, 48)] * 2)}
        for name, channels, strides in (("student_seen", STUDENT, [4, 8]), ("teacher_seen", TEACHER, [4, 8, 16])):
            seen = make_observation(channels, strides, len(channels))
            maps = [m[..., : 48 // s] for m, s in zip(seen.pyramid.maps, strides, strict=True)]
            wide = [pad(m, (0, padding // s), value=7.0) for m, s in zip(maps, strides, strict=True)]
            changed[name] = replace(seen, pyramid=replace(seen.pyramid, maps=tuple(wide)))
        module = make_term(term)
        for parameter in module.parameters():  # also those that start with 0
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        return float(module(replace(observed, **changed)).detach())

    assert compute_loss(80) == pytest.approx(compute_loss(0), rel=1e-4)


def test_fgd_is_float32_in_half_precision() -> None:
    """All but the adapters, which are networks; with equal channels there are none."""
    observed = ObservedPair(**(vars(make_pair()) | {"student_seen": make_observation([6, 6], [4, 8], 0)}))
    torch.manual_seed(0)
    term = FGDTerm(MapSettings([6, 6], TEACHER, counted=[True, True]), **TERMS[FGDTerm])
    for block in (*term.student_blocks, *term.teacher_blocks):
        nn.init.normal_(block.transform[-1].weight)
    expected = float(term(observed).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(term(observed).detach()) == pytest.approx(expected, rel=1e-6)


def test_equal_channels_are_correlated_as_they_are() -> None:
    assert not list(PKDTerm(EQUAL).parameters())
    assert list(make_term(PKDTerm).parameters())


def test_teachers_levels_may_differ_in_channels() -> None:
    term = FitNetTerm(MapSettings(STUDENT, [6, 4, 6], counted=[True, True]))
    observed = make_pair()
    narrow = ObservedPair(**(vars(observed) | {"teacher_seen": make_observation([6, 4, 6], [4, 8, 16], 1)}))
    assert term(narrow).isfinite()


def test_regions_are_imitated_from_the_level_that_each_detector_assigns() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 7, 7, requires_grad=True), torch.randn(3, 6, 7, 7)
    term = RoIImitationTerm(student_channels=5, teacher_channels=6)
    loss = term(make_pair(student=RegionView(pooled=student), teacher=RegionView(pooled=teacher)))
    target = (teacher - teacher.mean(dim=(0, 2, 3), keepdim=True)) / teacher.std(
        dim=(0, 2, 3), unbiased=False, keepdim=True
    )
    expected = (term.adapter(student) - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(loss, student)[0].abs().sum() > 0


def test_regions_of_a_student_with_the_teachers_head_become_the_teachers_own() -> None:
    """Equal features give loss 0 from the first step on, but not with a fresh adapter."""
    torch.manual_seed(0)
    features = 100 + 7 * torch.randn(3, 6, 7, 7)
    same = make_pair(student=RegionView(pooled=features), teacher=RegionView(pooled=features))
    losses = [
        float(RoIImitationTerm(student_channels=6, teacher_channels=6, same_space=same_space)(same).detach())
        for same_space in (True, False)
    ]
    assert losses[0] == pytest.approx(0, abs=1e-8)
    assert losses[1] > 0.1


def test_logits_of_other_anchors_are_refused() -> None:
    """The student's second level corresponds to the teacher's second but has the anchors of the third."""
    maps = tuple(torch.randn(2, 3, 64 // s, 64 // s) for s in (4, 8, 16))
    term = LogitTerm(columns=torch.tensor([0, 1, 2]), agree=torch.tensor([[True, False, False], [False, False, True]]))
    with pytest.raises(PairError, match="level 2 of the student corresponds to the teacher's level 2"):
        term(make_pair(student=RegionView(class_maps=maps[:2]), teacher=RegionView(class_maps=maps)))


def test_logits_are_compared_by_class_name_and_stride() -> None:
    """Two anchors of three columns each; the teacher has one more level and another order of classes."""
    columns = torch.tensor([0, 2, 1])
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(2, 6, 64 // s, 64 // s, generator=generator) for s in (4, 8, 16))
    ordered = tuple(m[:, [0, 2, 1, 3, 5, 4]] for m in maps)
    term = LogitTerm(columns=columns, agree=torch.ones(2, 3, dtype=torch.bool))
    same = make_pair(student=RegionView(class_maps=ordered[:2]), teacher=RegionView(class_maps=maps))
    assert float(term(same)) == pytest.approx(0, abs=1e-5)
    student = tuple(m.clone().requires_grad_() for m in maps[:2])
    loss = term(make_pair(student=RegionView(class_maps=student), teacher=RegionView(class_maps=maps)))
    assert float(loss.detach()) > 0.01
    for gradient in torch.autograd.grad(loss, student):
        assert gradient[:, [1, 2, 4, 5]].abs().sum() > 0
        assert not gradient[:, [0, 3]].any()  # the columns that already agree
