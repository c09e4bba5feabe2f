"""The boxes on which student and teacher are compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from gdetkd_cli.detectors.protocol import Candidates
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.structures import Batch, Regions, Target

NOTHING = torch.zeros(0, 4)
OBJECT = torch.tensor([[0.0, 0, 10, 10]])


def make_batch(*truths: Tensor) -> Batch:
    return Batch(
        images=[torch.zeros(3, 100, 100) for _ in truths],
        targets=[Target(boxes=t, labels=torch.ones(len(t), dtype=torch.int64)) for t in truths],
        image_ids=torch.arange(len(truths)),
    )


def make_candidates(*per_image: Tensor, sampled: bool) -> Candidates:
    index = torch.cat([torch.full((len(boxes),), i) for i, boxes in enumerate(per_image)])
    return Candidates(boxes=torch.cat(per_image), image_index=index, sampled=sampled)


def choose(candidates: Candidates, batch: Batch, *, seed: int = 0, **changes: Any) -> Regions:
    options = {"per_image": 8, "positive_iou": 0.5, "negatives_per_positive": 3.0} | changes
    return choose_regions(candidates, batch, generator=torch.Generator().manual_seed(seed), **options)


def boxes_at(x: float, count: int, *, step: float = 0.01) -> Tensor:
    """``count`` different boxes (x, 0, x + 10, 10), each a little further right."""
    left = x + step * torch.arange(count)
    return torch.stack([left, torch.zeros(count), left + 10, torch.full((count,), 10.0)], dim=1)


def check(regions: Regions, candidates: Candidates, batch: Batch) -> None:
    """Checks the rules of every choice."""
    assert not regions.boxes.requires_grad
    assert (regions.image_index.diff() >= 0).all()
    own = regions.candidate >= 0
    assert torch.equal(regions.boxes[own], candidates.boxes[regions.candidate[own]].detach())
    assert torch.equal(regions.image_index[own], candidates.image_index[regions.candidate[own]])
    assert len(regions.candidate[own].unique()) == own.sum()
    assert (regions.candidate[~own] == -1).all()
    for box, image in zip(regions.boxes[~own], regions.image_index[~own], strict=True):
        assert (batch.targets[image].boxes == box).all(dim=1).any()


# ------------------------------------------------------------------------------------------------ two-stage student


def test_sampled_proposals_are_thinned_out_in_their_order() -> None:
    candidates = make_candidates(boxes_at(0, 20), boxes_at(50, 3), boxes_at(20, 9), sampled=True)
    batch = make_batch(OBJECT, NOTHING, OBJECT)
    regions = choose(candidates, batch)

    check(regions, candidates, batch)
    assert [len(boxes) for boxes in regions.per_image(3)] == [8, 3, 8]
    assert (regions.candidate >= 0).all()  # the head's own proposals alone, the truth is not added
    assert (regions.candidate.diff() > 0).all()
    assert regions.candidate[8:11].tolist() == [20, 21, 22]


def test_few_proposals_are_all_taken() -> None:
    candidates = make_candidates(boxes_at(0, 5), sampled=True)
    regions = choose(candidates, make_batch(OBJECT))

    assert torch.equal(regions.boxes, candidates.boxes)
    assert regions.candidate.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sampled", [True, False])
def test_the_choice_depends_on_its_generator_alone(sampled: bool) -> None:
    candidates = make_candidates(torch.cat([boxes_at(0, 40), boxes_at(60, 40)]), sampled=sampled)
    batch = make_batch(OBJECT)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = choose(candidates, batch, seed=3)

    assert torch.equal(torch.get_rng_state(), state)  # distillation leaves the run's other random numbers as they were
    torch.manual_seed(2)
    assert torch.equal(choose(candidates, batch, seed=3).candidate, first.candidate)
    assert not torch.equal(choose(candidates, batch, seed=4).candidate, first.candidate)


def test_the_draw_is_fair() -> None:
    candidates = make_candidates(boxes_at(0, 10), sampled=True)
    taken = torch.zeros(10)
    for seed in range(300):
        taken[choose(candidates, make_batch(OBJECT), seed=seed, per_image=3).candidate] += 1

    assert taken.sum() == 900
    assert taken.min() > 60  # 90 expected of each


# ---------------------------------------------------------------------------------------------------- dense student


def test_one_positive_to_three_negatives_and_the_truth_is_positive() -> None:
    candidates = make_candidates(boxes_at(50, 30), torch.cat([boxes_at(60, 30), boxes_at(1, 20)]), sampled=False)
    batch = make_batch(OBJECT + 50, OBJECT)
    regions = choose(candidates, batch)
    check(regions, candidates, batch)

    in_second = regions.image_index == 1
    own = regions.candidate[in_second]
    # A budget of 8: 2 positives, one of them the truth, and 6 negatives.
    assert own.tolist().count(-1) == 1
    assert ((own >= 60) & (own < 80)).sum() == 1
    assert ((own >= 30) & (own < 60)).sum() == 6


def test_positives_overlap_by_more_than_the_threshold() -> None:
    just_half = torch.tensor([[0.0, 0, 10, 5]])  # IoU 0.5 with the object
    more = torch.tensor([[0.0, 0, 10, 6]])  # 0.6
    candidates = make_candidates(torch.cat([just_half, more]), sampled=False)
    assert box_iou(candidates.boxes, OBJECT).flatten().tolist() == pytest.approx([0.5, 0.6])

    # 2 of 4 are positives; no negatives are wanted, so that only they come.
    regions = choose(candidates, make_batch(OBJECT), per_image=4, negatives_per_positive=0.0)
    assert regions.candidate.tolist() == [1, -1]
    regions = choose(candidates, make_batch(OBJECT), per_image=4, negatives_per_positive=0.0, positive_iou=0.4)
    assert regions.candidate.tolist() == [0, 1, -1]


def test_a_positive_of_one_image_is_none_of_another() -> None:
    """A candidate's overlap is with the truth of its own image."""
    candidates = make_candidates(boxes_at(0, 20), boxes_at(0, 20), sampled=False)
    batch = make_batch(OBJECT, OBJECT + 50)
    regions = choose(candidates, batch)
    check(regions, candidates, batch)

    counts = [(regions.candidate[regions.image_index == i] >= 0).sum().item() for i in range(2)]
    assert counts == [1, 3]  # one positive beside the truth; three negatives for the truth


def test_few_positives_bring_few_negatives() -> None:
    candidates = make_candidates(boxes_at(60, 50), sampled=False)
    regions = choose(candidates, make_batch(OBJECT), per_image=40)

    assert len(regions) == 4  # the truth and three negatives, not 39


def test_few_negatives_leave_room_unused() -> None:
    candidates = make_candidates(torch.cat([boxes_at(60, 2), boxes_at(0, 30)]), sampled=False)
    regions = choose(candidates, make_batch(OBJECT))

    assert sorted((regions.candidate < 2).tolist()) == [False, True, True, True]  # 2 negatives, the truth, 1 positive


def test_an_image_without_objects_gives_as_many_negatives_as_one_positive() -> None:
    candidates = make_candidates(boxes_at(0, 30), boxes_at(60, 30), sampled=False)
    batch = make_batch(NOTHING, OBJECT)
    regions = choose(candidates, batch)
    check(regions, candidates, batch)

    assert (regions.image_index == 0).sum() == 3
    assert (regions.candidate[:3] >= 0).all()


def test_more_objects_than_regions() -> None:
    candidates = make_candidates(boxes_at(0, 30), sampled=False)
    batch = make_batch(boxes_at(0, 12, step=5))
    regions = choose(candidates, batch)
    check(regions, candidates, batch)

    assert len(regions) == 8
    assert (regions.candidate == -1).all()
    assert len(regions.boxes.unique(dim=0)) == 8
    assert not torch.equal(choose(candidates, batch, seed=1).boxes, regions.boxes)


@pytest.mark.parametrize("per_image", [1, 2, 3, 7, 64])
def test_the_cap_holds(per_image: int) -> None:
    per = [torch.cat([boxes_at(0, 100), boxes_at(60, 100)]) for _ in range(3)]
    candidates = make_candidates(*per, sampled=False)
    batch = make_batch(OBJECT, boxes_at(0, 5, step=10), NOTHING)
    regions = choose(candidates, batch, per_image=per_image)

    check(regions, candidates, batch)
    assert all(len(boxes) <= per_image for boxes in regions.per_image(3))


def test_candidates_of_no_image() -> None:
    """Without candidates only the truth remains, and an image without objects has no regions."""
    candidates = make_candidates(NOTHING, NOTHING, sampled=False)
    batch = make_batch(NOTHING, OBJECT)
    regions = choose(candidates, batch)

    assert torch.equal(regions.boxes, OBJECT)
    assert regions.image_index.tolist() == [1]
    assert regions.candidate.tolist() == [-1]
    assert regions.candidate.dtype == regions.image_index.dtype == torch.int64
    nothing = choose(candidates, make_batch(NOTHING, NOTHING))
    assert nothing.boxes.shape == (0, 4)
    assert nothing.image_index.dtype == torch.int64


@pytest.mark.parametrize("sampled", [True, False])
def test_regions_are_detached(sampled: bool) -> None:
    boxes = boxes_at(0, 20).requires_grad_()
    regions = choose(make_candidates(boxes, sampled=sampled), make_batch(OBJECT))

    assert not regions.boxes.requires_grad


def test_a_crowd_leaves_room_for_negatives() -> None:
    truth = torch.cat([boxes_at(10.0 * i, 1) for i in range(9)])
    candidates = make_candidates(torch.cat([truth, boxes_at(200, 30)]), sampled=False)
    batch = make_batch(truth)
    regions = choose(candidates, batch, per_image=16)
    check(regions, candidates, batch)
    greatest = box_iou(regions.boxes, truth).amax(dim=1)
    assert ((greatest > 0.5).sum().item(), len(regions)) == (4, 16)
    assert len(choose(candidates, batch, per_image=3)) == 3  # fewer than one positive and its negatives
