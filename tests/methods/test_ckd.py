"""CKD's equations, by hand and against plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gdetkd_cli.methods.ckd import CKDTerm, contrastive_loss, overlap_negatives


def all_but_itself(regions: int) -> Tensor:
    return ~torch.eye(regions, dtype=torch.bool)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_contrastive(
    student: Tensor, teacher: Tensor, gamma: float, negatives: Tensor, memory: Tensor, memory_negatives: Tensor
) -> float:
    """The equation in Python's doubles."""

    def g(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)) / gamma

    s, t, m = student.tolist(), teacher.tolist(), memory.tolist()
    losses = []
    for i, row in enumerate(s):
        positive = math.exp(g(row, t[i]))
        total = positive
        total += sum(math.exp(g(row, t[j])) for j in range(len(t)) if j != i and negatives[i, j])
        total += sum(math.exp(g(row, m[j])) for j in range(len(m)) if memory_negatives[i, j])
        losses.append(-math.log(positive / total))
    return sum(losses) / len(losses)


def test_two_views_of_one_image_in_a_batch_are_no_negatives() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 10]])
    place, ids = torch.tensor([0, 0, 1, 2]), torch.tensor([7, 7, 7, 8])  # the batch holds image 7 twice
    pair: Any = SimpleNamespace(regions=SimpleNamespace(boxes=boxes, image_index=place), image_ids=ids)
    term = CKDTerm(student_channels=2, teacher_channels=2, project_channels=2, gamma=0.1, negative_iou=0.5, queue=4)
    expected = [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    assert term._find_negatives(pair).int().tolist() == expected


def test_by_hand() -> None:
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 0.5]])

    # cos is 1 for a pair and 0 across, so each region gives -log(e / (e + 1)) = log(1 + 1 / e) = 0.313262.
    loss = contrastive_loss(student, teacher, gamma=1.0, negatives=all_but_itself(2))
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    # With gamma = 0.5: log(1 + e^-2) = 0.126928.
    loss = contrastive_loss(student, teacher, gamma=0.5, negatives=all_but_itself(2))
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)


def test_the_mean_over_regions_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    # Region 0: log(1 + e^(0 - 1)) = 0.313262. Region 1: log(1 + e^(1 - 0)) = 1.313262. Mean: 0.813262.
    loss = contrastive_loss(student, teacher, gamma=1.0, negatives=all_but_itself(2))
    assert loss.item() == pytest.approx(0.813262, abs=1e-6)


def test_memory_by_hand() -> None:
    student = teacher = torch.tensor([[1.0, 0.0]])
    memory = torch.tensor([[0.0, 9.0], [-2.0, 0.0], [1.0, 0.0]])
    memory_negatives = torch.tensor([[True, True, False]])

    # Denominator: e^1 (itself) + e^0 + e^-1; the third row is of the same image. log(e + 1 + 1/e) - 1 = 0.407606.
    loss = contrastive_loss(
        student,
        teacher,
        gamma=1.0,
        negatives=all_but_itself(1),
        memory=memory,
        memory_negatives=memory_negatives,
    )
    assert loss.item() == pytest.approx(0.407606, abs=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.07])
def test_is_the_slow_version(gamma: float) -> None:
    student, teacher, memory = draw(5, 6, seed=1), draw(5, 6, seed=2), draw(7, 6, seed=3)
    negatives, memory_negatives = draw(5, 5, seed=4) > 0, draw(5, 7, seed=5) > 0
    loss = contrastive_loss(
        student, teacher, gamma=gamma, negatives=negatives, memory=memory, memory_negatives=memory_negatives
    )

    expected = slow_contrastive(student, teacher, gamma, negatives, memory, memory_negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_is_never_negative() -> None:
    for seed in range(20):
        negatives = draw(6, 6, seed=seed + 200) > 0
        loss = contrastive_loss(draw(6, 4, seed=seed), draw(6, 4, seed=seed + 100), gamma=0.07, negatives=negatives)
        assert loss.item() >= 0


def test_goes_to_zero_at_a_perfect_match_with_far_negatives() -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])

    # log(1 + e^(-2 / 0.07)) = 4e-13, and not below 0: the positive is in the denominator.
    loss = contrastive_loss(student, student, gamma=0.07, negatives=all_but_itself(2))
    assert 0 <= loss.item() < 1e-6


@pytest.mark.parametrize("regions", [1, 4])
def test_the_positive_stays_without_negatives(regions: int) -> None:
    """For one region, or overlapping regions, the fraction is 1, and loss and gradient are 0."""
    student = draw(regions, 3).requires_grad_()
    loss = contrastive_loss(
        student, draw(regions, 3, seed=1), gamma=0.07, negatives=torch.zeros(regions, regions, dtype=torch.bool)
    )
    loss.backward()

    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_the_diagonal_of_negatives_is_ignored() -> None:
    student, teacher = draw(4, 3), draw(4, 3, seed=1)
    with_diagonal = contrastive_loss(student, teacher, gamma=0.2, negatives=torch.ones(4, 4, dtype=torch.bool))

    assert torch.equal(with_diagonal, contrastive_loss(student, teacher, gamma=0.2, negatives=all_but_itself(4)))


def test_no_regions_give_zero_with_a_gradient_path() -> None:
    student, teacher = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    loss = contrastive_loss(
        student,
        teacher,
        gamma=0.07,
        negatives=torch.zeros(0, 0, dtype=torch.bool),
        memory=draw(5, 3),
        memory_negatives=torch.zeros(0, 5, dtype=torch.bool),
    )
    loss.backward()

    assert loss.item() == 0
    assert student.grad is not None
    assert teacher.grad is not None


@pytest.mark.parametrize("remembered", [False, True])
def test_both_projections_learn(remembered: bool) -> None:
    student, teacher, memory = (draw(4, 3, seed=seed).requires_grad_() for seed in range(3))
    contrastive_loss(
        student,
        teacher,
        gamma=0.5,
        negatives=all_but_itself(4),
        memory=memory if remembered else None,
        memory_negatives=torch.ones(4, 4, dtype=torch.bool) if remembered else None,
    ).backward()

    for tensor in (student, teacher, memory) if remembered else (student, teacher):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_under_autocast(dtype: torch.dtype) -> None:
    """cos / 0.07 reaches 14.3, and exp(14.3) overflows half precision: the loss does not."""
    student = draw(6, 8).to(dtype)
    memory, memory_negatives = student.flip(0), torch.ones(6, 6, dtype=torch.bool)

    def loss() -> Tensor:
        return contrastive_loss(
            student,
            student,
            gamma=0.07,
            negatives=all_but_itself(6),
            memory=memory,
            memory_negatives=memory_negatives,
        )

    with torch.autocast("cpu", torch.bfloat16):
        inside = loss()
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss())
    assert torch.isfinite(inside)


def test_overlap_by_hand() -> None:
    iou = torch.tensor(
        [
            [1.0, 0.6, 0.5, 0.9],
            [0.6, 1.0, 0.0, 0.6],
            [0.5, 0.0, 1.0, 0.0],
            [0.9, 0.6, 0.0, 1.0],
        ]
    )
    negatives = overlap_negatives(iou, torch.tensor([0, 0, 0, 1]), threshold=0.5)

    assert negatives.tolist() == [
        [False, False, True, True],  # 1 overlaps by more than 0.5; 2 by just 0.5; 3 is in another image
        [False, False, True, True],
        [True, True, False, True],
        [True, True, True, False],
    ]


def test_overlap_of_no_regions() -> None:
    assert overlap_negatives(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), 0.5).shape == (0, 0)


def test_boxes_without_area_are_negatives() -> None:
    """Their IoU is 0 / 0, which must not make the loss NaN."""
    negatives = overlap_negatives(torch.full((2, 2), float("nan")), torch.tensor([0, 0]), 0.5)

    assert negatives.tolist() == [[False, True], [True, False]]
