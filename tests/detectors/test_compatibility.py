"""Which methods a pair of detectors allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gdetkd_cli.detectors.compatibility import (
    classify_pair,
    list_shapes,
    match_class_maps,
    match_classes,
    match_predictions,
)
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import PairError

STUDENT, TEACHER = ("circle", "square", "triangle"), ("triangle", "circle", "square")
COLUMNS = [0, 2, 3, 1]  # of the teacher, for background, circle, square and triangle

TinyDetector = Callable[..., Detector]


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ("faster-rcnn", "faster-rcnn", "homogeneous"),
        ("retinanet", "faster-rcnn", "heterogeneous"),
        ("faster-rcnn", "retinanet", "heterogeneous"),
        ("fcos", "fcos", "heterogeneous"),  # no RoI heads to compare
    ],
)
def test_kinds(student: str, teacher: str, kind: str, tiny_detector: TinyDetector) -> None:
    assert classify_pair(tiny_detector(student), tiny_detector(teacher)) == kind


def test_columns_follow_the_names(tiny_detector: TinyDetector) -> None:
    columns = match_classes(tiny_detector("fcos", classes=STUDENT), tiny_detector("fcos", classes=TEACHER))

    assert columns.tolist() == COLUMNS
    # Reordering the teacher's outputs by it puts them in the student's order.
    of_teacher = torch.tensor([0, 30, 10, 20])  # background, triangle, circle, square
    assert of_teacher[columns].tolist() == [0, 10, 20, 30]


def test_equal_class_lists_keep_their_columns(tiny_detector: TinyDetector) -> None:
    assert match_classes(tiny_detector("fcos"), tiny_detector("faster-rcnn")).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (("circle", "cube"), ("circle",), r"only the student has \['cube'\]"),
        (("circle",), ("circle", "cube"), r"only the teacher has \['cube'\]"),
        (("circle", "ball"), ("circle", "cube"), r"only the student has \['ball'\]; only the teacher has \['cube'\]"),
    ],
)
def test_other_classes_are_named(
    student: tuple[str, ...], teacher: tuple[str, ...], message: str, tiny_detector: TinyDetector
) -> None:
    with pytest.raises(PairError, match=f"the class lists differ: {message}"):
        match_classes(tiny_detector("faster-rcnn", classes=student), tiny_detector("faster-rcnn", classes=teacher))


def test_prediction_columns(tiny_detector: TinyDetector) -> None:
    student, teacher = (tiny_detector("faster-rcnn", classes=classes) for classes in (STUDENT, TEACHER))

    assert match_predictions(student, teacher).tolist() == COLUMNS


@pytest.mark.parametrize(("student", "teacher"), [("retinanet", "faster-rcnn"), ("faster-rcnn", "fcos")])
def test_predictions_need_two_roi_heads(student: str, teacher: str, tiny_detector: TinyDetector) -> None:
    families = {"faster-rcnn": "two-stage", "retinanet": "dense", "fcos": "dense"}
    with pytest.raises(PairError, match=f"{families[teacher]} -> {families[student]}"):
        match_predictions(tiny_detector(student), tiny_detector(teacher))


def test_box_coders_must_agree(tiny_detector: TinyDetector) -> None:
    """Else deltas in different units are compared."""
    student = tiny_detector("faster-rcnn")
    teacher = tiny_detector("faster-rcnn", arguments={"bbox_reg_weights": (20.0, 20.0, 5.0, 5.0)})
    with pytest.raises(PairError, match=r"box coders differ: weights \(20.0, 20.0, 5.0, 5.0\) -> \(10.0, 10.0"):
        match_predictions(student, teacher)


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_dense_heads_alike_can_be_compared(head: str, tiny_detector: TinyDetector) -> None:
    columns = match_class_maps(tiny_detector(head, classes=STUDENT), tiny_detector(head, classes=TEACHER))
    assert columns.tolist() == COLUMNS


@pytest.mark.parametrize(
    ("student", "teacher"), [("retinanet", "fcos"), ("retinanet", "faster-rcnn"), ("faster-rcnn", "faster-rcnn")]
)
def test_other_heads_cannot_be_compared_cell_by_cell(student: str, teacher: str, tiny_detector: TinyDetector) -> None:
    with pytest.raises(PairError, match=r"only two RetinaNets or two FCOS have heads .*; this pair is"):
        match_class_maps(tiny_detector(student), tiny_detector(teacher))


def test_other_anchors_cannot_be_compared(tiny_detector: TinyDetector) -> None:
    student = tiny_detector("retinanet")
    teacher = tiny_detector(
        "retinanet", arguments={"anchor_sizes": [[9 * level.stride[0]] for level in student.levels]}
    )
    with pytest.raises(PairError, match="the anchors differ"):
        match_class_maps(student, teacher)


@pytest.mark.parametrize("head", ["faster-rcnn", "retinanet", "fcos"])
def test_box_shapes_of_a_level(head: str, tiny_detector: TinyDetector) -> None:
    """torchvision's anchors in cells; for an FCOS, boxes of 6.5 to 13 cells."""
    detector = tiny_detector(head)
    shapes = list_shapes(detector)
    assert len(shapes) == len(detector.levels)
    if head == "fcos":
        assert all((shape.prod(dim=1).sqrt() == pytest.approx(13 / 2**0.5, rel=0.01)) for shape in shapes)
        return
    generator = detector.module.rpn.anchor_generator if head == "faster-rcnn" else detector.module.anchor_generator
    for shape, level, sizes in zip(shapes, detector.levels, generator.sizes, strict=True):
        areas = (shape[:, 0] * level.stride[1] * shape[:, 1] * level.stride[0]).sqrt()
        expected = torch.tensor([float(size) for _ in generator.aspect_ratios[0] for size in sizes])
        assert (areas - expected).abs().max() <= 1  # torchvision rounds corners to pixels
