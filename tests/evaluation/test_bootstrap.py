"""AP on drawn images against pycocotools on data that repeat each image as often as it was drawn."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import CLASSES, scenes

from gdetkd_cli.data.split import Record
from gdetkd_cli.evaluation.bootstrap import MatchedImages, deviation_of_difference, draw_again
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.structures import Detections


def test_every_image_once_is_pycocotools_ap() -> None:
    records, predictions = scenes()
    expected = evaluate_coco(records, CLASSES, predictions).ap
    once = np.ones(len(records), dtype=np.int64)
    assert MatchedImages(records, CLASSES, predictions).ap(once) == pytest.approx(expected, abs=1e-9)


def test_images_drawn_again_are_pycocotools_ap_on_copies() -> None:
    records, predictions = scenes()
    times = np.random.default_rng(0).integers(0, 4, size=len(records))
    copies, copied = [], {}
    for record, count in zip(records, times.tolist(), strict=True):
        for copy in range(count):
            image_id = record.image_id + 1000 * copy
            copies.append(Record(image_id, record.size, record.boxes, record.labels, record.truth))
            copied[image_id] = predictions[record.image_id]
    expected = evaluate_coco(copies, CLASSES, copied).ap
    assert MatchedImages(records, CLASSES, predictions).ap(times) == pytest.approx(expected, abs=1e-6)


def test_a_class_without_detections_counts_as_zero_and_one_without_objects_not() -> None:
    records, predictions = scenes()
    cats = {}
    for image_id, one in predictions.items():
        kept = one.labels == 1
        cats[image_id] = Detections(one.boxes[kept], one.scores[kept], one.labels[kept])
    once = np.ones(len(records), dtype=np.int64)
    expected = evaluate_coco(records, CLASSES, cats).ap
    assert MatchedImages(records, CLASSES, cats).ap(once) == pytest.approx(expected, abs=1e-9)
    assert np.isnan(MatchedImages(records, CLASSES, cats).ap(0 * once))


def test_the_deviation_over_images_is_of_the_mean_over_seeds() -> None:
    ours, theirs = np.array([[3.0, 5.0, 7.0], [1.0, 1.0, 1.0]]), np.array([[1.0, 1.0, 1.0], [1.0, 3.0, 1.0]])
    # Mean differences: 1, 1 and 3.
    assert deviation_of_difference(list(ours), list(theirs)) == pytest.approx((4 / 3) ** 0.5)
    assert deviation_of_difference(list(theirs), list(ours)) == pytest.approx((4 / 3) ** 0.5)
    assert deviation_of_difference(list(ours), list(ours)) == 0.0


def test_a_drawing_without_objects_is_left_out() -> None:
    ours, theirs = [np.array([3.0, np.nan, 5.0])], [np.array([1.0, np.nan, 1.0])]
    assert deviation_of_difference(ours, theirs) == pytest.approx(2**0.5)


def test_fewer_images_say_less() -> None:
    deviations = []
    for images in (10, 40):
        records, _ = scenes(images=images)
        drawings = draw_again(images, drawings=200)
        matched = (MatchedImages(records, CLASSES, scenes(images=images, quality=q)[1]) for q in (2.0, 10.0))
        good, bad = ([one.compute_aps(drawings)] for one in matched)
        deviations.append(deviation_of_difference(good, bad))
    assert deviations[0] > deviations[1] > 0


def test_every_drawing_has_as_many_images_and_is_the_same_again() -> None:
    drawings = draw_again(30, drawings=50)
    assert drawings.shape == (50, 30)
    assert (drawings.sum(axis=1) == 30).all()
    assert len(np.unique(drawings, axis=0)) == 50
    assert np.array_equal(drawings, draw_again(30, drawings=50))
