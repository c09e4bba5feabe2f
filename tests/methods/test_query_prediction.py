"""Prediction distillation between two DETR-like decoders: hand-made numbers and slow versions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdetkd_cli.detectors.protocol import QueryView
from gdetkd_cli.methods import processes
from gdetkd_cli.methods.base import averages_regions
from gdetkd_cli.methods.prediction import QueryClassTerm, choose_once, query_box_loss, query_class_loss


def test_sigmoid_scores_by_hand() -> None:
    # One region, one class: teacher 0.5, student 0.8. KL(0.5 || 0.8) = 0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2).
    loss = query_class_loss(torch.tensor([[math.log(4)]]), torch.tensor([[0.0]]), exclusive=False)
    assert float(loss) == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), abs=1e-6)


def test_softmax_scores_by_hand() -> None:
    # Teacher (1/2, 1/2), student (3/4, 1/4).
    loss = query_class_loss(torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2), exclusive=True)
    assert float(loss) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)


def test_sigmoid_scores_slowly() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 4, generator=generator) for _ in range(2))
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            q, p = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(query_class_loss(student, teacher, exclusive=False)) == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("exclusive", [False, True])
def test_equal_scores_cost_nothing_and_only_the_student_learns(exclusive: bool) -> None:
    student = torch.randn(3, 4, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    loss = query_class_loss(student, teacher, exclusive=exclusive)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None and student.grad.abs().max() < 1e-6
    assert teacher.grad is None


def test_boxes_by_hand() -> None:
    student = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    teacher = torch.tensor([[0.6, 0.5, 0.2, 0.4], [0.9, 0.1, 0.1, 0.1]])
    loss = query_box_loss(student, teacher, torch.tensor([1.0, 0.5]))
    assert float(loss) == pytest.approx((1.0 * 0.3 + 0.5 * 0.8) / 2)


def view(rows: list[int], overlap: list[float], logits: list[float]) -> QueryView:
    count = len(rows)
    scores = torch.tensor(logits)[:, None]
    return QueryView(scores, torch.zeros(count, 4), torch.tensor(rows), torch.tensor(overlap))


def test_each_query_is_matched_once_where_it_overlaps_most() -> None:
    """Regions 0 and 1 want one teacher query, 3 and 4 are one student query, and region 2's teacher is elsewhere."""
    ours = view([0, 1, 2, 3, 3, 4], [1.0, 1.0, 1.0, 1.0, 0.9, 1.0], [0.0, 1, 2, 3, 4, 5])
    theirs = view([7, 7, 8, 5, 6, 9], [0.9, 0.95, 0.1, 0.8, 0.7, 0.5], [10.0, 11, 12, 13, 14, 15])
    pair: Any = SimpleNamespace(
        student_view=SimpleNamespace(queries=ours), teacher_view=SimpleNamespace(queries=theirs)
    )
    found = QueryClassTerm(columns=torch.tensor([0]), exclusive=False).read(pair)
    assert [one.class_logits[:, 0].tolist() for one in found] == [[1, 3, 5], [11, 13, 15]]
    # The first of equal ones.
    assert choose_once(torch.tensor([1, 1, 2]), torch.tensor([0.5, 0.5, 0.1])).tolist() == [True, False, True]


def test_the_mean_over_matched_regions_covers_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes have three regions; one is matched here, and two are in the other process."""
    ours = view([0, 1, 2], [1.0, 0.1, 0.1], [math.log(4), 0.0, 0.0])
    theirs = view([0, 1, 2], [1.0, 0.1, 0.1], [0.0, 0.0, 0.0])
    pair: Any = SimpleNamespace(
        student_view=SimpleNamespace(queries=ours), teacher_view=SimpleNamespace(queries=theirs)
    )
    term = QueryClassTerm(columns=torch.tensor([0]), exclusive=False)
    alone = float(term(pair))
    assert alone == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), abs=1e-6)
    monkeypatch.setattr(processes, "count_processes", lambda: 2)
    monkeypatch.setattr(processes, "sum_over_processes", lambda own: own + 2)
    assert float(term(pair)) / 2 == pytest.approx(alone / 3)  # the processes' losses are averaged
    assert not averages_regions(term)  # the number of all regions has no part in it


def test_no_regions_cost_nothing() -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (
        query_class_loss(empty, torch.zeros(0, 4), exclusive=False),
        query_box_loss(empty, torch.zeros(0, 4), torch.zeros(0)),
    ):
        assert loss.requires_grad and float(loss) == 0
