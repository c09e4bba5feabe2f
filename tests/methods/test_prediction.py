"""The prediction terms' equations, by hand and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gdetkd_cli.methods.prediction import box_loss, class_loss


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(value) for value in row]
    return [value / sum(exps) for value in exps]


def test_class_loss_by_hand_has_the_teacher_in_front() -> None:
    teacher = torch.tensor([[0.75, 0.25]]).log()
    student = torch.tensor([[0.5, 0.5]]).log()

    # KL(t || s) = 0.75 ln(0.75 / 0.5) + 0.25 ln(0.25 / 0.5) = 0.304099 - 0.173287 = 0.130812,
    # the other way round 0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25) = -0.202733 + 0.346574 = 0.143841.
    assert class_loss(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)
    assert class_loss(teacher, student).item() == pytest.approx(0.143841, abs=1e-6)


def test_class_loss_is_the_mean_over_regions() -> None:
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()

    assert class_loss(student, teacher).item() == pytest.approx(0.130812 / 2, abs=1e-6)


def test_class_loss_is_the_slow_version() -> None:
    student, teacher = 2 * draw(7, 5), 2 * draw(7, 5, seed=1)
    per_region = [
        sum(p * math.log(p / q) for p, q in zip(softmax(t), softmax(s), strict=True))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]

    assert class_loss(student, teacher).item() == pytest.approx(sum(per_region) / 7, rel=1e-5)


def test_class_loss_at_equality() -> None:
    """Logits that differ by a constant are equal distributions."""
    student = draw(4, 5).requires_grad_()
    loss = class_loss(student, student.detach() + 3)
    loss.backward()

    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_class_loss_moves_the_student_alone() -> None:
    student, teacher = draw(2, 3).requires_grad_(), draw(2, 3, seed=1).requires_grad_()
    class_loss(student, teacher).backward()

    # d KL / d logits = (softmax(s) - softmax(t)) / R
    expected = (student.softmax(dim=1) - teacher.softmax(dim=1)) / 2
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_box_loss_by_hand() -> None:
    # One region, two classes and background; the teacher gives them 1/2 (background), 1/4 and 1/4.
    teacher_logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.zeros(1, 3, 4)
    teacher = torch.tensor([[[1000.0, 1000, 1000, 1000], [4, 0, 0, -2], [-4, 0, 8, -2]]])

    # By coordinate, the sum over classes inside the absolute value:
    #   x: |4/4 - 4/4| = 0 (outside it would be 2), y: 0, w: |8/4| = 2, h: |-2/4 - 2/4| = 1. Together 3.
    assert box_loss(student, teacher, teacher_logits).item() == pytest.approx(3, abs=1e-5)


def test_box_loss_weighs_classes_by_the_teacher() -> None:
    teacher_logits = torch.tensor([[0.0, 0.8, 0.2], [0.0, 0.2, 0.8]]).clamp(min=1e-9).log()
    teacher = torch.zeros(2, 3, 4)
    student = torch.zeros(2, 3, 4)
    student[:, 1, 0] = 1.0

    # Region 0: 0.8 * 1, region 1: 0.2 * 1; their mean 0.5.
    assert box_loss(student[:1], teacher[:1], teacher_logits[:1]).item() == pytest.approx(0.8, abs=1e-6)
    assert box_loss(student[1:], teacher[1:], teacher_logits[1:]).item() == pytest.approx(0.2, abs=1e-6)
    assert box_loss(student, teacher, teacher_logits).item() == pytest.approx(0.5, abs=1e-6)


def test_box_loss_is_the_slow_version() -> None:
    student, teacher, logits = draw(6, 4, 4), draw(6, 4, 4, seed=1), draw(6, 4, seed=2)
    total = 0.0
    for i in range(6):
        probability = softmax(logits[i].tolist())
        for coordinate in range(4):
            total += abs(
                sum(
                    probability[c] * (teacher[i, c, coordinate].item() - student[i, c, coordinate].item())
                    for c in range(1, 4)  # column 0 is background
                )
            )

    assert box_loss(student, teacher, logits).item() == pytest.approx(total / 6, rel=1e-5)


def test_box_loss_leaves_the_background_column_alone() -> None:
    student, teacher, logits = draw(5, 3, 4).requires_grad_(), draw(5, 3, 4, seed=1), draw(5, 3, seed=2)
    loss = box_loss(student, teacher, logits)
    loss.backward()

    assert student.grad is not None
    assert (student.grad[:, 0] == 0).all()
    assert (student.grad[:, 1:] != 0).all()
    changed = teacher.clone()
    changed[:, 0] += 100
    assert torch.equal(box_loss(student, changed, logits), loss)


def test_box_loss_at_equality() -> None:
    deltas = draw(3, 4, 4)

    assert box_loss(deltas, deltas, draw(3, 4)).item() == 0


def test_box_loss_moves_the_student_alone() -> None:
    student, teacher, logits = (draw(*shape).requires_grad_() for shape in ((2, 3, 4), (2, 3, 4), (2, 3)))
    box_loss(student, teacher + 1, logits).backward()

    assert student.grad is not None
    assert teacher.grad is None
    assert logits.grad is None


def test_no_regions_give_zero_with_a_gradient_path() -> None:
    logits, deltas = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4, 4, requires_grad=True)
    loss = class_loss(logits, logits.detach()) + box_loss(deltas, deltas.detach(), logits.detach())
    loss.backward()

    assert loss.item() == 0
    assert logits.grad is not None
    assert deltas.grad is not None


def test_float32_under_autocast() -> None:
    student, teacher = draw(5, 4).bfloat16(), draw(5, 4, seed=1).bfloat16()
    deltas, others = draw(5, 4, 4).bfloat16(), draw(5, 4, 4, seed=1).bfloat16()
    expected = class_loss(student, teacher), box_loss(deltas, others, teacher)

    with torch.autocast("cpu", torch.bfloat16):
        inside = class_loss(student, teacher), box_loss(deltas, others, teacher)
    for ours, theirs in zip(inside, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
