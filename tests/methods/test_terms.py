"""Terms on an observed pair; other files test the equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.pooling import pool_all_levels
from gdetkd_cli.detectors.protocol import Observation, RegionView, StageView
from gdetkd_cli.methods.base import ObservedPair, Term, collect_needs
from gdetkd_cli.methods.ckd import CKDTerm, contrastive_loss
from gdetkd_cli.methods.prediction import BoxTerm, ClassTerm, class_loss
from gdetkd_cli.methods.sgfi import SGFITerm, imitation_loss
from gdetkd_cli.structures import Batch, Frame, LevelSpec, Pyramid, Regions

COLUMNS = torch.tensor([0, 2, 3, 1])  # the teacher's column for each of the student's


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_regions(boxes: Tensor, image_index: list[int]) -> Regions:
    index = torch.tensor(image_index, dtype=torch.int64)
    return Regions(boxes=boxes, image_index=index, candidate=torch.full_like(index, -1))


APART = torch.tensor([[0.0, 0, 8, 8], [16, 16, 28, 28], [4, 4, 20, 20]])


def make_pair(
    *,
    boxes: Tensor = APART,
    image_index: tuple[int, ...] = (0, 0, 1),
    ids: tuple[int, ...] = (7, 8),
    student: RegionView | None = None,
    teacher: RegionView | None = None,
    maps: tuple[Tensor, ...] = (),
) -> ObservedPair:
    """Regions on two 32-pixel images with the outputs of two detectors; level l has stride 2 ** (l + 1)."""
    regions = make_regions(boxes, list(image_index))
    frame = Frame(scale=torch.ones(2, 2), shift=torch.zeros(2, 2), size=(32, 32))
    levels = tuple(
        LevelSpec(
            name=str(i),
            channels=m.shape[1],
            stride=(32 / m.shape[2], 32 / m.shape[3]),
            offset=(0.5, 0.5),
            shape=(m.shape[2], m.shape[3]),
        )
        for i, m in enumerate(maps)
    )
    seen = Observation(losses={}, pyramid=Pyramid(maps=maps, levels=levels, frame=frame), candidates=None)
    return ObservedPair(
        regions=regions,
        image_ids=torch.tensor(ids, dtype=torch.int64)[regions.image_index],
        batch=Batch(images=[torch.zeros(3, 32, 32)] * 2, targets=[], image_ids=torch.tensor(ids)),
        student_seen=seen,
        teacher_seen=seen,
        student_view=student or RegionView(level=torch.zeros(len(regions), dtype=torch.int64)),
        teacher_view=teacher or RegionView(),
    )


def make_sgfi(**changes: Any) -> SGFITerm:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "student_channels": [5, 5],
        "teacher_channels": 6,
        "embed_channels": 4,
        "prior": 0.0,
        "normalize": "none",
        "sampling_ratio": 2,
    }
    return SGFITerm(**(options | changes))


MAPS = (draw(2, 5, 16, 16, seed=1), draw(2, 5, 8, 8, seed=2))


@pytest.mark.parametrize("normalize", ["none", "channel", "scalar"])
def test_sgfi_imitates_the_target(normalize: str) -> None:
    target = 40 * draw(3, 6, 7, 7) + 5
    pair = make_pair(maps=MAPS, teacher=RegionView(pooled=target))
    term = make_sgfi(normalize=normalize)
    loss = term(pair)

    if normalize != "none":
        dims = (0, 2, 3) if normalize == "channel" else (0, 1, 2, 3)
        deviation, mean = torch.std_mean(target, dim=dims, correction=0, keepdim=True)
        target = (target - mean) / deviation
    levels = pool_all_levels(pair.student_seen.pyramid, pair.regions, size=7, sampling_ratio=2)
    expected = imitation_loss(term.matcher(levels, target)[0], target)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_sgfi_starts_from_the_students_own_level() -> None:
    """With a strong prior, the result equals using only each region's own level."""
    own = torch.tensor([0, 1, 0])
    target = draw(3, 6, 7, 7)
    pair = make_pair(maps=MAPS, student=RegionView(level=own), teacher=RegionView(pooled=target))
    term = make_sgfi(prior=1e4, centre="student")
    levels = pool_all_levels(pair.student_seen.pyramid, pair.regions, size=7, sampling_ratio=2)
    alone = torch.where((own == 0)[:, None, None, None], levels[0], levels[1])

    torch.testing.assert_close(term(pair), imitation_loss(term.matcher.adapters[0](alone), target))


@pytest.mark.parametrize(("level", "nearest"), [(0, 0), (1, 1), (2, 1)])
def test_sgfi_starts_from_the_stride_that_the_teacher_pools_from(level: int, nearest: int) -> None:
    """With teacher strides 2, 4 and 32 and student strides 2 and 4, the student's own assignment has no effect."""
    target = draw(3, 6, 7, 7)
    view = RegionView(pooled=target, level=torch.full((3,), level))
    pair = make_pair(maps=MAPS, teacher=view)
    strides = ((2.0, 2.0), (4.0, 4.0), (32.0, 32.0))
    base = pair.teacher_seen.pyramid
    levels = tuple(replace(base.levels[0], stride=stride) for stride in strides)
    seen = replace(pair.teacher_seen, pyramid=replace(base, levels=levels))
    term = make_sgfi(prior=1e4, centre="teacher")
    loss = term(replace(pair, teacher_seen=seen))

    pooled = pool_all_levels(pair.student_seen.pyramid, pair.regions, size=7, sampling_ratio=2)
    torch.testing.assert_close(loss, imitation_loss(term.matcher.adapters[0](pooled[nearest]), target))


def test_the_prior_is_measured_in_pixels_of_the_image() -> None:
    """The teacher gets the image at half the size, so its stride of 2 is 4 pixels of the image."""
    target = draw(3, 6, 7, 7)
    pair = make_pair(maps=MAPS, teacher=RegionView(pooled=target, level=torch.zeros(3, dtype=torch.int64)))
    frame = pair.teacher_seen.pyramid.frame
    halved = replace(pair.teacher_seen.pyramid, frame=replace(frame, scale=frame.scale / 2))
    term = make_sgfi(prior=1e4, centre="teacher")
    loss = term(replace(pair, teacher_seen=replace(pair.teacher_seen, pyramid=halved)))

    pooled = pool_all_levels(pair.student_seen.pyramid, pair.regions, size=7, sampling_ratio=2)
    torch.testing.assert_close(loss, imitation_loss(term.matcher.adapters[0](pooled[1]), target))


def test_sgfi_of_any_teachers_scale_is_alike() -> None:
    """Without standardisation, the loss grows with the square of the teacher's scale."""
    target = draw(3, 6, 7, 7)
    raw = [make_sgfi()(make_pair(maps=MAPS, teacher=RegionView(pooled=s * target))).item() for s in (1, 100)]
    even = [
        make_sgfi(normalize="channel")(make_pair(maps=MAPS, teacher=RegionView(pooled=s * target))).item()
        for s in (1, 100)
    ]

    assert raw[1] > 1000 * raw[0]
    assert even[1] == pytest.approx(even[0], rel=1e-4)


@pytest.mark.parametrize("normalize", ["none", "channel", "scalar"])
def test_sgfi_ignores_padded_channels(normalize: str) -> None:
    """With 6 channels on one teacher level and 2 on another, regions of the latter use 2 channels."""
    channels = torch.tensor([6, 2, 6])
    target = (draw(3, 6, 7, 7) + 3) * (torch.arange(6) < channels[:, None])[:, :, None, None]
    term = make_sgfi(normalize=normalize)
    nn.init.zeros_(term.matcher.embed_in.weight)  # all levels match alike: only the aggregate has a gradient
    adapter = term.matcher.adapters[0]
    assert isinstance(adapter, nn.Conv2d) and adapter.bias is not None
    bias = adapter.bias
    wide = make_pair(maps=MAPS, teacher=RegionView(pooled=target, pooled_channels=channels))
    narrow = make_pair(boxes=APART[1:2], image_index=(0,), maps=MAPS, teacher=RegionView(target[1:2], channels[1:2]))

    (gradient,) = torch.autograd.grad(term(wide), bias)
    assert (gradient != 0).all()
    loss = term(narrow)
    (gradient,) = torch.autograd.grad(loss, bias)
    assert (gradient != 0).tolist() == [True, True, False, False, False, False]
    if normalize == "none":
        levels = pool_all_levels(narrow.student_seen.pyramid, narrow.regions, size=7, sampling_ratio=2)
        imitation, _ = term.matcher(levels, target[1:2])
        torch.testing.assert_close(loss, imitation_loss(imitation[:, :2], target[1:2, :2]))


@pytest.mark.parametrize("normalize", ["none", "channel", "scalar"])
def test_sgfi_in_the_teachers_own_space(normalize: str) -> None:
    """A student with the teacher's head starts at loss 0 if its features equal the teacher's."""
    features = 30 * draw(2, 6, 16, 16, seed=3) - 4
    pair = make_pair(maps=(features,))
    (target,) = pool_all_levels(pair.student_seen.pyramid, pair.regions, size=7, sampling_ratio=2)
    pair = make_pair(maps=(features,), teacher=RegionView(pooled=target))

    same = make_sgfi(student_channels=[6], normalize=normalize, same_space=True)
    assert same(pair).item() == pytest.approx(0, abs=1e-6)
    assert make_sgfi(student_channels=[6], normalize=normalize)(pair).item() > 0.1


def test_sgfi_without_regions() -> None:
    term = make_sgfi(normalize="channel")
    maps = tuple(m.clone().requires_grad_() for m in MAPS)
    loss = term(
        make_pair(boxes=torch.zeros(0, 4), image_index=(), maps=maps, teacher=RegionView(torch.zeros(0, 6, 7, 7)))
    )
    loss.backward()

    assert loss.item() == 0
    assert all(m.grad is not None for m in maps)


def make_ckd(*, queue: int = 8, gamma: float = 0.2) -> CKDTerm:
    torch.manual_seed(0)
    return CKDTerm(
        student_channels=5, teacher_channels=6, project_channels=4, gamma=gamma, negative_iou=0.5, queue=queue
    )


def views(regions: int = 3, seed: int = 0) -> dict[str, Any]:
    """Embeddings of both, as arguments of ``make_pair``."""
    return {
        "student": RegionView(embedding=draw(regions, 5, seed=seed)),
        "teacher": RegionView(embedding=draw(regions, 6, seed=seed + 100)),
    }


def test_ckd_without_a_memory() -> None:
    pair, term = make_pair(**views()), make_ckd(queue=0)
    assert pair.student_view.embedding is not None and pair.teacher_view.embedding is not None
    expected = contrastive_loss(
        term.project_student(pair.student_view.embedding),
        term.project_teacher(pair.teacher_view.embedding),
        gamma=0.2,
        negatives=~torch.eye(3, dtype=torch.bool),
    )

    for _ in range(2):  # nothing is remembered
        torch.testing.assert_close(term(pair), expected)


def test_ckd_overlapping_regions_of_an_image_are_no_negatives() -> None:
    overlapping = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    term = make_ckd(queue=0)

    assert term(make_pair(boxes=overlapping, image_index=(0, 0), **views(2))).item() == pytest.approx(0, abs=1e-6)
    assert term(make_pair(boxes=overlapping, image_index=(0, 1), **views(2))).item() > 0.01
    half = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])  # IoU 0.5: not more than the threshold
    assert term(make_pair(boxes=half, image_index=(0, 0), **views(2))).item() > 0.01


def test_ckd_remembers_earlier_steps_but_not_the_same_image() -> None:
    term = make_ckd()
    first, second = make_pair(ids=(7, 8), **views()), make_pair(ids=(9, 7), **views(seed=1))
    term(first)
    remembered, remembered_ids = term.queue.rows()
    assert remembered_ids.tolist() == [7, 7, 8]
    assert torch.equal(remembered, draw(3, 6, seed=100))

    # Regions 0 and 1 are of image 9: all that is remembered is a negative. Region 2 is of image 7: only the last.
    expected = contrastive_loss(
        term.project_student(draw(3, 5, seed=1)),
        term.project_teacher(draw(3, 6, seed=101)),
        gamma=0.2,
        negatives=~torch.eye(3, dtype=torch.bool),
        memory=term.project_teacher(remembered),
        memory_negatives=torch.tensor([[True, True, True], [True, True, True], [False, False, True]]),
    )
    torch.testing.assert_close(term(second), expected)
    assert term.queue.rows()[1].tolist() == [7, 7, 8, 9, 9, 7]


def test_ckd_own_regions_are_not_yet_in_the_memory() -> None:
    """A single region of a single image has no negatives, so its loss is 0 at every step."""
    term = make_ckd()
    for seed in range(3):
        pair = make_pair(boxes=APART[:1], image_index=(0,), **views(1, seed=seed))
        assert term(pair).item() == pytest.approx(0, abs=1e-6)


def test_ckd_backward_after_the_memory_has_moved_on() -> None:
    """Two steps' graphs, as in gradient accumulation, each keep the memory that they read."""
    term = make_ckd(queue=3)
    losses = [term(make_pair(ids=(i, 10 + i), **views(seed=i))) for i in range(3)]
    torch.stack(losses).sum().backward()

    assert term.project_teacher.weight.grad is not None
    assert torch.isfinite(term.project_teacher.weight.grad).all()


@pytest.mark.parametrize("filled", [False, True])
def test_ckd_without_regions(filled: bool) -> None:
    term = make_ckd()
    if filled:
        term(make_pair(**views()))
    loss = term(make_pair(boxes=torch.zeros(0, 4), image_index=(), **views(0)))
    loss.backward()

    assert loss.item() == 0
    assert all(parameter.grad is not None for parameter in term.parameters())


def test_ckd_learns_to_tell_regions_apart() -> None:
    term = make_ckd(gamma=0.07)
    pair = make_pair(**views())
    optimizer = torch.optim.Adam(term.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = term(pair)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert min(losses) >= 0
    assert losses[-1] < 0.01 < losses[0]


def test_class_term_permutes_the_teachers_columns() -> None:
    teacher = draw(3, 4)
    student = teacher[:, COLUMNS].clone().requires_grad_()
    deltas = torch.zeros(3, 4, 4)
    aligned = make_pair(
        student=RegionView(class_logits=student, box_deltas=deltas),
        teacher=RegionView(class_logits=teacher, box_deltas=deltas),
    )

    loss = ClassTerm(columns=COLUMNS)(aligned)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6
    assert ClassTerm(columns=torch.arange(4))(aligned).item() > 0.01


def test_box_term_permutes_deltas_and_their_weights() -> None:
    logits, deltas = torch.zeros(1, 4), torch.zeros(1, 4, 4)
    logits[0] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()  # of the teacher: background, triangle, circle, square
    deltas[0, 2, 0] = 10.0  # circle
    student = torch.zeros(1, 4, 4)
    student[0, 1, 1] = 5.0  # circle, in the student's order
    pair = make_pair(
        boxes=APART[:1],
        image_index=(0,),
        student=RegionView(class_logits=logits, box_deltas=student),
        teacher=RegionView(class_logits=logits, box_deltas=deltas),
    )

    # Both differences are circle's, whose probability is 0.3: |0.3 * 10| + |0.3 * -5| = 4.5.
    assert BoxTerm(columns=COLUMNS)(pair).item() == pytest.approx(4.5, rel=1e-5)


def test_later_stages_count_by_their_weights() -> None:
    logits, deltas = draw(3, 4), draw(3, 4, 4, seed=1)
    stages = [StageView(APART, draw(3, 4, seed=s), draw(3, 4, 4, seed=s + 10)) for s in (2, 3, 4, 5)]
    pair = make_pair(
        student=RegionView(class_logits=logits, box_deltas=deltas, later=tuple(stages[:2])),
        teacher=RegionView(class_logits=logits, box_deltas=deltas, later=tuple(stages[2:])),
    )
    term = ClassTerm(columns=torch.arange(4), stage_weights=(0.5, 0.25))
    by_stage = [class_loss(stages[i].class_logits, stages[i + 2].class_logits) for i in (0, 1)]
    torch.testing.assert_close(term(pair), 0.5 * by_stage[0] + 0.25 * by_stage[1])
    assert ClassTerm(columns=torch.arange(4))(pair).item() == pytest.approx(0, abs=1e-6)


def test_needs_are_those_of_all_terms() -> None:
    sgfi, ckd, classes = make_sgfi(), make_ckd(), ClassTerm(columns=COLUMNS)
    cases: list[tuple[list[Term], set[str], set[str]]] = [
        ([], set(), set()),
        ([sgfi], set(), {"pooled"}),
        ([make_sgfi(prior=1.0, centre="teacher")], set(), {"pooled", "level"}),
        ([make_sgfi(prior=1.0)], {"level"}, {"pooled"}),
        ([sgfi, ckd], {"embedding"}, {"pooled", "embedding"}),
        ([ckd, classes], {"embedding", "predictions"}, {"embedding", "predictions"}),
    ]
    for terms, student, teacher in cases:
        of_student, of_teacher = collect_needs(terms)
        assert (set(of_student), set(of_teacher)) == (student, teacher)
