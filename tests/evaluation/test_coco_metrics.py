"""COCO metrics by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from gdetkd_cli.data.split import Record
from gdetkd_cli.errors import DataError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco, match_images
from gdetkd_cli.structures import Detections

CLASSES = ("cat", "dog")
NOTHING = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))

Box = tuple[float, float, float, float]  # xyxy, pixels
CAT: Box = (10, 10, 60, 60)  # 50 x 50 pixels: medium


def record(image_id: int, *objects: tuple[Box, int], crowd: bool = False) -> Record:
    """An image and its truth; evaluation does not use training boxes."""
    truth: list[dict[str, object]] = [
        {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "category_id": label,
            "iscrowd": int(crowd),
        }
        for (x1, y1, x2, y2), label in objects
    ]
    empty = torch.zeros(0, dtype=torch.int64)
    return Record(image_id=image_id, size=(200, 200), boxes=torch.zeros(0, 4), labels=empty, truth=truth)


def found(*detections: tuple[Box, float, int]) -> Detections:
    boxes, scores, labels = zip(*detections, strict=True)
    return Detections(boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))


def test_perfect_predictions() -> None:
    small, large = (0.0, 0.0, 20.0, 20.0), (50.0, 50.0, 190.0, 190.0)
    records = [record(1, (CAT, 1), (large, 2)), record(2, (small, 2))]
    predictions = {1: found((large, 0.9, 2), (CAT, 0.8, 1)), 2: found((small, 0.7, 2))}
    metrics = evaluate_coco(records, CLASSES, predictions)

    assert metrics.ap == pytest.approx(100)
    assert metrics.ap50 == metrics.ap75 == pytest.approx(100)
    assert metrics.ap_small == metrics.ap_medium == metrics.ap_large == pytest.approx(100)
    assert metrics.ar == pytest.approx(100)
    assert metrics.per_class == {"cat": pytest.approx(100), "dog": pytest.approx(100)}
    assert (metrics.images, metrics.detections) == (2, 3)


def test_one_of_two_found() -> None:
    """Precision is 1 up to recall 0.5, which is 51 of COCO's 101 points, and 0 beyond."""
    records = [record(1, (CAT, 1)), record(2, (CAT, 1))]
    metrics = evaluate_coco(records, CLASSES, {1: found((CAT, 0.9, 1))})

    assert metrics.ap == pytest.approx(100 * 51 / 101)
    assert metrics.ar == pytest.approx(50)


def test_false_alarm_before_the_hit() -> None:
    """Precision is 1/2 at every recall."""
    elsewhere = (100.0, 100.0, 150.0, 150.0)
    metrics = evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: found((elsewhere, 0.9, 1), (CAT, 0.8, 1))})

    assert metrics.ap == pytest.approx(50)
    assert metrics.ar == pytest.approx(100)


def test_second_box_on_one_object_is_a_false_alarm() -> None:
    """Ranked hit, repetition, hit: precision 1 up to recall 0.5, then 2/3 (51 and 50 points)."""
    records = [record(1, (CAT, 1)), record(2, (CAT, 1))]
    predictions = {1: found((CAT, 0.9, 1), (CAT, 0.8, 1)), 2: found((CAT, 0.7, 1))}
    metrics = evaluate_coco(records, CLASSES, predictions)

    assert metrics.ap == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_overlap_decides_by_threshold() -> None:
    """IoU 40 / 50 = 0.8 passes 0.50 to 0.80: 7 of the 10 thresholds."""
    metrics = evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: found(((10.0, 10.0, 60.0, 50.0), 0.9, 1))})

    assert metrics.ap == pytest.approx(70)
    assert metrics.ap50 == metrics.ap75 == pytest.approx(100)


def test_wrong_class() -> None:
    metrics = evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: found((CAT, 0.9, 2))})

    assert metrics.ap == 0
    assert metrics.per_class == {"cat": 0, "dog": None}


def test_crowds_are_neither_hits_nor_misses() -> None:
    crowd = record(2, ((0.0, 0.0, 100.0, 100.0), 1), crowd=True)
    metrics = evaluate_coco([record(1, (CAT, 1)), crowd], CLASSES, {1: found((CAT, 0.5, 1)), 2: found((CAT, 0.9, 1))})

    assert metrics.ap == pytest.approx(100)


def test_size_is_that_of_the_annotation() -> None:
    metrics = evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: found((CAT, 0.9, 1))})

    assert (metrics.ap_small, metrics.ap_large) == (None, None)
    assert metrics.ap_medium == pytest.approx(100)


@pytest.mark.parametrize("predictions", [{}, {1: NOTHING}])
def test_no_detections(predictions: dict[int, Detections]) -> None:
    metrics = evaluate_coco([record(1, (CAT, 1))], CLASSES, predictions)

    assert (metrics.ap, metrics.ap50, metrics.ar) == (0, 0, 0)
    assert metrics.per_class == {"cat": 0, "dog": None}
    assert metrics.detections == 0


@pytest.mark.parametrize("records", [[], [record(1)]])
def test_no_objects(records: list[Record]) -> None:
    metrics = evaluate_coco(records, CLASSES, {one.image_id: found((CAT, 0.9, 1)) for one in records})

    assert (metrics.ap, metrics.ap50, metrics.ap75, metrics.ar) == (None, None, None, None)
    assert metrics.per_class == {"cat": None, "dog": None}
    assert metrics.images == metrics.detections == len(records)


def test_predictions_for_an_unknown_image() -> None:
    with pytest.raises(DataError, match="image id 8 first"):
        evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: NOTHING, 9: NOTHING, 8: NOTHING})


@pytest.mark.parametrize("label", [0, 3])
def test_label_outside_the_class_list(label: int) -> None:
    with pytest.raises(DataError, match=f"labels 1 to 2, got {label} for the image with image id 1"):
        evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: found((CAT, 0.9, label))})


def test_inputs_stay_as_they_are_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(1, (CAT, 1))]
    predictions = {1: found((CAT, 0.9, 1))}
    evaluate_coco(records, CLASSES, predictions)

    assert set(records[0].truth[0]) == {"bbox", "area", "category_id", "iscrowd"}
    assert predictions[1].boxes.tolist() == [list(CAT)]
    assert capsys.readouterr() == ("", "")


def test_to_json() -> None:
    metrics = CocoMetrics(
        ap=1.0,
        ap50=2.0,
        ap75=3.0,
        ap_small=4.0,
        ap_medium=5.0,
        ap_large=None,
        ar=6.0,
        per_class={"cat": 7.0, "dog": None},
        images=8,
        detections=9,
    )
    text = json.dumps(metrics.to_json())

    assert text == (
        '{"AP": 1.0, "AP50": 2.0, "AP75": 3.0, "AP_S": 4.0, "AP_M": 5.0, "AP_L": null, "AR": 6.0, '
        '"per_class": {"cat": 7.0, "dog": null}, "images": 8, "detections": 9}'
    )


def test_real_metrics_are_plain_numbers() -> None:
    """JSON cannot store numpy's numbers."""
    metrics = evaluate_coco([record(1, (CAT, 1))], CLASSES, {1: found((CAT, 0.9, 1))})

    assert json.loads(json.dumps(metrics.to_json()))["AP"] == pytest.approx(100)


def test_import_is_light() -> None:
    """The command line imports CocoMetrics and must not import torch."""
    heavy = "{'torch', 'pycocotools', 'faster_coco_eval'}"
    code = f"import sys, gdetkd_cli.evaluation.coco_metrics; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_the_numbers_are_pycocotools_own() -> None:
    """Images with crowds, misses, doubles and made-up boxes of all sizes."""
    generator = torch.Generator().manual_seed(0)
    records, predictions = [], {}
    for image_id in range(1, 31):
        count = int(torch.randint(0, 6, (1,), generator=generator))
        corners = torch.rand(count, 2, generator=generator) * 120
        sides = 4 + 150 * torch.rand(count, 2, generator=generator) ** 2
        boxes, labels = torch.cat([corners, corners + sides], dim=1), torch.randint(1, 3, (count,), generator=generator)
        objects = [(tuple(b), int(k)) for b, k in zip(boxes.tolist(), labels, strict=True)]
        records.append(record(image_id, *objects, crowd=image_id % 7 == 0))  # type: ignore[arg-type]  # four numbers
        near = boxes.repeat(2, 1) + (4 * torch.randn(2 * count, 2, generator=generator)).repeat(1, 2)
        scores = torch.rand(2 * count, generator=generator)
        predictions[image_id] = Detections(near, scores, labels.repeat(2))
    ours = evaluate_coco(records, CLASSES, predictions)
    theirs = match_images(records, CLASSES, predictions)
    theirs.accumulate()
    theirs.summarize()

    found = [ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large, ours.ar]
    assert None not in found
    assert found == pytest.approx([100 * theirs.stats[i] for i in (0, 1, 2, 3, 4, 5, 8)], abs=1e-6)
