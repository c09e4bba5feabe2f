"""Errors by type and confusions, by hand-made boxes whose result can be counted."""

from __future__ import annotations

import pytest
import torch
from drawn import CLASSES, scenes
from numpy.testing import assert_array_equal

from gdetkd_cli.data.split import Record
from gdetkd_cli.evaluation.coco_metrics import compute_precision, evaluate_coco
from gdetkd_cli.evaluation.confusion import count_confusions
from gdetkd_cli.evaluation.errors import ERRORS, Matches, find_best_score, match_split, measure_errors
from gdetkd_cli.structures import Detections

BOX = [0.0, 0.0, 10.0, 10.0]  # xyxy
FAR = [50.0, 50.0, 60.0, 60.0]
HALF = [0.0, 0.0, 10.0, 4.0]  # IoU 0.4 with BOX


def image(*objects: tuple[list[float], int], crowd: bool = False) -> Record:
    truth: list[dict[str, object]] = [
        {"bbox": [x, y, x2 - x, y2 - y], "area": 100.0, "category_id": label, "iscrowd": int(crowd)}
        for (x, y, x2, y2), label in objects
    ]
    return Record(1, (100, 100), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), truth)


def found(*detections: tuple[list[float], int, float]) -> dict[int, Detections]:
    boxes, labels, scores = zip(*detections, strict=True) if detections else ((), (), ())
    return {1: Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels).long())}


def match(record: Record, detections: dict[int, Detections]) -> Matches:
    return match_split([record], 2, detections)


@pytest.mark.parametrize(
    ("detections", "kinds"),
    [
        ([(BOX, 1, 0.9)], ["hit"]),
        ([(BOX, 2, 0.9)], ["class"]),
        ([(HALF, 1, 0.9)], ["location"]),
        ([(HALF, 2, 0.9)], ["class and location"]),
        ([(BOX, 1, 0.9), (BOX, 1, 0.8)], ["hit", "duplicate"]),
        ([(FAR, 1, 0.9)], ["background"]),
    ],
)
def test_each_detection_has_one_type(detections: list[tuple[list[float], int, float]], kinds: list[str]) -> None:
    matches = match(image((BOX, 1)), found(*detections))

    assert [("hit" if kind < 0 else ERRORS[kind]) for kind in matches.kinds.tolist()] == kinds
    explained = {"hit", "class", "location"} & set(kinds)
    assert matches.missed.tolist() == [0, 0 if explained else 1, 0]


def test_a_class_error_costs_the_object_that_it_could_have_found() -> None:
    # Class 1 has two objects: one is hit, one is found with the wrong class. AP50 of class 1 is 51 of 101 recalls.
    report = measure_errors(match(image((BOX, 1), (FAR, 1)), found((BOX, 1, 0.9), (FAR, 2, 0.8))))

    assert report.ap50 == pytest.approx(100 * 51 / 101)
    assert report.costs["class"] == pytest.approx(100 * 50 / 101)
    assert [report.costs[name] for name in ERRORS if name != "class"] == [0] * 5
    assert report.counts["class"] == 0  # at score 0.9, which has the best F1


def test_a_background_error_costs_precision_and_a_missed_object_recall() -> None:
    # The background detection comes first, so precision is 1/2 up to recall 1/2.
    report = measure_errors(match(image((BOX, 1), (FAR, 1)), found(([80, 80, 90, 90.0], 1, 0.9), (BOX, 1, 0.8))))

    assert report.ap50 == pytest.approx(100 * 51 / 101 / 2)
    assert report.costs["background"] == pytest.approx(100 * 51 / 101 / 2)
    assert report.costs["missed"] == pytest.approx(100 / 2 - 100 * 51 / 101 / 2)
    assert report.counts == {"class": 0, "location": 0, "class and location": 0, "duplicate": 0, "background": 1} | {
        "missed": 1
    }


def test_only_the_best_of_two_errors_about_an_object_is_repaired() -> None:
    matches = match(image((BOX, 1)), found((HALF, 1, 0.9), ([0, 0, 10, 3.0], 1, 0.8)))

    assert matches.repaired.tolist() == [1, 0]
    assert measure_errors(matches).costs["location"] == pytest.approx(100)


def test_detections_on_a_crowd_do_not_count() -> None:
    matches = match(image((BOX, 1), crowd=True), found((HALF, 1, 0.9)))

    assert len(matches.scores) == 0
    assert matches.objects.sum() == 0


def test_nothing_found_and_nothing_there() -> None:
    assert measure_errors(match(image(), found())).ap50 == 0
    missed = measure_errors(match(image((BOX, 1)), {}))
    assert missed.counts["missed"] == 1
    assert missed.min_score == 0.5
    assert find_best_score(match(image(), found((BOX, 1, 0.9)))) == 0.5


def test_ap50_is_that_of_coco() -> None:
    records, predictions = scenes(images=24)

    ap50 = measure_errors(match_split(records, len(CLASSES), predictions)).ap50

    assert ap50 == pytest.approx(evaluate_coco(records, CLASSES, predictions).ap50, abs=1e-6)


def test_the_mean_precision_is_the_ap() -> None:
    records, predictions = scenes()
    precision = compute_precision(records, CLASSES, predictions)[0.5]

    assert precision.shape == (101, 3)
    assert (precision[:, 2] == -1).all()  # no bird
    assert 100 * precision[:, :2].mean() == pytest.approx(evaluate_coco(records, CLASSES, predictions).ap50)


def test_confusions() -> None:
    record = image((BOX, 1), (FAR, 2))
    detections = found((BOX, 2, 0.9), (BOX, 1, 0.2), ([80, 80, 90, 90.0], 1, 0.8))

    counts = count_confusions([record], 2, detections, min_score=0.5)

    assert_array_equal(counts, [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert_array_equal(count_confusions([record], 2, {}, min_score=0.5), [[0, 0, 1], [0, 0, 1], [0, 0, 0]])
