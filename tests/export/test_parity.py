"""Parity of an exported file and its detector, with hand-made detections."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdetkd_cli.export.parity import Cut, Parity, build_empty_image, check_parity
from gdetkd_cli.structures import Detections

CUT = Cut(score=0.05, count=5)
IMAGE = torch.zeros(3, 40, 60)
Row = tuple[float, float, float, float, float, int]

# x1, y1, x2, y2, score, label
A: Row = (2, 2, 12, 12, 0.9, 1)
B: Row = (20, 4, 34, 18, 0.6, 2)
C: Row = (40, 20, 55, 38, 0.3, 1)


class Answers:
    """Returns the same detections for every image."""

    def __init__(self, *rows: Row) -> None:
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        self._found = Detections(boxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())

    def predict(self, images: list[Tensor]) -> list[Detections]:
        return [self._found for _ in images]


class Blind:
    """Has a detection if ``sees`` is true."""

    def __init__(self, sees: Callable[[Tensor], bool]) -> None:
        self._sees = sees

    def predict(self, images: list[Tensor]) -> list[Detections]:
        return [Answers(*([A] if self._sees(image) else [])).predict([image])[0] for image in images]


def compare(expected: list[Row], got: list[Row]) -> Parity:
    return check_parity(Answers(*expected), Answers(*got), [IMAGE], cut=CUT)


def move(row: Row, by: float) -> Row:
    return (row[0] + by, *row[1:])


def set_score(row: Row, score: float) -> Row:
    return (*row[:4], score, row[5])


def test_equal_detections_pass() -> None:
    parity = compare([A, B, C], [A, B, C])
    assert parity == Parity(1, 0, 3, 0.0, 0.0, passed=True, unmatched=0)


def test_images_without_detections_are_counted() -> None:
    parity = check_parity(Answers(), Answers(), [IMAGE, IMAGE], cut=CUT)
    assert parity == Parity(2, 2, 0, 0.0, 0.0, passed=True, unmatched=0)


def test_errors_are_measured() -> None:
    parity = compare([A, B], [move(A, 0.02), set_score(B, 0.6004)])
    assert parity.passed
    assert parity.max_box_error == pytest.approx(0.02, abs=1e-5)
    assert parity.max_score_error == pytest.approx(4e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("expected", "got", "unmatched"),
    [
        pytest.param([A, B], [move(A, 0.5), B], 0, id="a box has moved"),
        pytest.param([A, B], [A, set_score(B, 0.61)], 0, id="a score differs"),
        pytest.param([A, B, C], [A, B], 1, id="a box is missing"),
        pytest.param([A, B], [A, B, C], 1, id="a box too many"),
        pytest.param([], [C], 1, id="a box where there is none"),
        pytest.param([A, B], [], 2, id="nothing is found"),
        pytest.param([A], [(*A[:5], 2)], 2, id="another class"),
        pytest.param([A], [move(A, 9)], 2, id="another place"),
        pytest.param([A, A], [A], 1, id="one box for two"),
        pytest.param([A], [set_score(A, math.nan)], 0, id="the score is NaN"),
        pytest.param([A], [move(A, math.nan)], 2, id="the box is NaN"),
        pytest.param([A], [A, set_score(C, math.nan)], 1, id="a box too many with a score of NaN"),
    ],
)
def test_differences_fail(expected: list[Row], got: list[Row], unmatched: int) -> None:
    for one, other in ((expected, got), (got, expected)):
        parity = compare(one, other)
        assert not parity.passed
        assert parity.unmatched == unmatched


def test_near_equal_scores_may_swap_places() -> None:
    near = set_score(C, 0.60001)
    assert compare([A, B, near], [A, near, B]).passed


def test_what_is_cut_off_by_rounding_may_differ() -> None:
    at_threshold, above = set_score(C, 0.0505), set_score(C, 0.06)
    assert compare([A, at_threshold], [A]).passed
    assert compare([A], [A, at_threshold]).passed
    assert not compare([A, above], [A]).passed


def test_the_last_of_a_full_image_may_differ() -> None:
    full = [A, B, (0, 30, 8, 38, 0.5, 3), (10, 30, 18, 38, 0.4, 3)]
    last, rival = set_score(C, 0.3), (30.0, 1.0, 38.0, 9.0, 0.3002, 3)
    assert compare([*full, last], [*full, rival]).passed
    assert not compare([*full[1:], last], [*full[1:], rival]).passed, "four boxes are not full: both should be there"
    assert not compare([*full, last], [*full, set_score(rival, 0.35)]).passed


def test_at_the_cut_each_side_may_keep_another_of_two_boxes() -> None:
    full = [A, B, C, move(A, 30), set_score(C, 0.2001)]  # as many as are reported
    other = [*full[:4], set_score(move(C, 4), 0.2)]
    assert compare(full, other).passed
    assert not compare(full, [*full[:4], set_score(move(C, 4), 0.3)]).passed  # not at the cut
    assert not compare([*full[1:], move(A, 4)], full).passed  # nor is this one: it moved


def test_where_everything_lies_at_the_cut_nothing_is_proved() -> None:
    parity = compare([set_score(A, 0.0505)], [set_score(move(A, 3), 0.0505)])
    assert (parity.detections, parity.unmatched, parity.passed) == (0, 0, False)


def test_a_image_without_detections_is_found() -> None:
    assert build_empty_image(Blind(lambda image: False), (8, 9)).shape == (3, 8, 9)
    only_white = build_empty_image(Blind(lambda image: bool(image.mean() < 1)), (8, 9))
    assert only_white.eq(1).all()
    sees_every_shade = Blind(lambda image: not image.isnan().any())
    assert build_empty_image(sees_every_shade, (8, 9)).isnan().all()
