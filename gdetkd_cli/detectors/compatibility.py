"""Checks which methods a pair of detectors allows: its kind, prediction distillation, head transfer."""

from __future__ import annotations

from math import log
from typing import Literal

import torch
from torch import Tensor

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import PairError

PairKind = Literal["homogeneous", "heterogeneous"]


def classify_pair(student: Detector, teacher: Detector) -> PairKind:
    """``homogeneous`` if both have RoI heads, or both have queries, whose predictions can be compared."""
    same = student.family == teacher.family and student.family in ("two-stage", "query")
    return "homogeneous" if same else "heterogeneous"


def match_classes(student: Detector, teacher: Detector) -> Tensor:
    """(K + 1,) int64: the teacher's output column for each of the student's, by class name; background is 0.

    Raises:
        PairError: the class lists differ.
    """
    missing = sorted(set(student.class_names) - set(teacher.class_names))
    extra = sorted(set(teacher.class_names) - set(student.class_names))
    if missing or extra:
        sides = [("student", missing[:3]), ("teacher", extra[:3])]
        only = "; ".join(f"only the {side} has {names}" for side, names in sides if names)
        raise PairError(f"the class lists differ: {only}")
    return torch.tensor([0] + [teacher.class_names.index(name) + 1 for name in student.class_names])


def match_predictions(student: Detector, teacher: Detector) -> Tensor:
    """Checks that the predictions of two RoI heads can be compared; returns ``match_classes``.

    Raises:
        PairError: a detector without a RoI head, different class lists, or different box coders.
    """
    if student.box_weights is None or teacher.box_weights is None:
        raise PairError(
            "predictions can be compared between two two-stage or two DETR-like detectors only; this pair is "
            f"{teacher.family} -> {student.family}"
        )
    if student.box_weights != teacher.box_weights:
        raise PairError(f"the box coders differ: weights {teacher.box_weights} -> {student.box_weights}")
    return match_classes(student, teacher)


def match_queries(student: Detector, teacher: Detector) -> Tensor:
    """Checks that the predictions of two DETR-like decoders can be compared.

    Returns:
        (K,) or (K + 1,) int64, the teacher's column for each of the student's; "no object" is last.

    Raises:
        PairError: a detector without queries, other kinds of class scores, or different class lists.
    """
    if student.exclusive_classes is None or teacher.exclusive_classes is None:
        raise PairError(
            f"only two detectors with queries can be compared query by query; this pair is {teacher.family} -> "
            f"{student.family}"
        )
    if student.exclusive_classes != teacher.exclusive_classes:
        kinds = ["softmax" if d.exclusive_classes else "sigmoid" for d in (teacher, student)]
        raise PairError(f"the class scores are of different kinds: {kinds[0]} -> {kinds[1]}")
    columns = match_classes(student, teacher)
    return (
        torch.cat([columns[1:] - 1, columns.new_tensor([len(columns) - 1])])
        if student.exclusive_classes
        else columns[1:] - 1
    )


def choose_stage_weights(student: Detector, teacher: Detector) -> tuple[float, ...]:
    """Loss weights of the student's later stages if both detectors are cascades with the same stages; else empty."""
    return student.later_weights if student.later_box_weights == teacher.later_box_weights else ()


def match_class_maps(student: Detector, teacher: Detector) -> Tensor:
    """Checks that two dense heads score a cell in the same way; returns ``match_classes``.

    Raises:
        PairError: the heads are not two RetinaNets or two FCOS, no level of the teacher has the anchors of a student
            level, or the class lists differ.
    """
    if student.dense_head is None or student.dense_head != teacher.dense_head:
        raise PairError(
            "only two RetinaNets or two FCOS have heads that can be compared cell by cell; this pair is "
            f"{type(teacher.module).__name__} -> {type(student.module).__name__}"
        )
    agree = compare_anchors(student, teacher)
    for level in range(len(agree)):
        if not agree[level].any():
            raise _build_anchor_error(student, teacher, level, _find_nearest_level(student, teacher, level))
    return match_classes(student, teacher)


def compare_anchors(student: Detector, teacher: Detector) -> Tensor:
    """(L_student, L_teacher) bool: whether two levels have the same anchors, in cells; both detectors need anchors."""
    ours, theirs = _get_anchors(student), _get_anchors(teacher)
    # Corners are rounded to pixels, that is by up to half a pixel in a cell of four pixels or more.
    return torch.tensor(
        [[a.shape == b.shape and float((a.cpu() - b.cpu()).abs().max()) <= 0.15 for b in theirs] for a in ours]
    )


def check_anchors(student: Detector, teacher: Detector) -> None:
    """Checks that each student level has the anchors that the teacher's head was trained on at that stride.

    Raises:
        PairError: the teacher's level with the nearest stride, in model pixels, has other anchors.
    """
    agree = compare_anchors(student, teacher)
    for level in range(len(agree)):
        if not agree[level, other := _find_nearest_level(student, teacher, level)]:
            raise _build_anchor_error(student, teacher, level, other)


def list_shapes(detector: Detector) -> list[Tensor]:
    """By level (A, 2), width and height in cells of the boxes that a level detects: its anchors.

    Without such anchors (FCOS, SSD, the user's own module): the usual size of a level's objects in three shapes.
    """
    if detector.anchors is not None and (detector.family == "two-stage" or detector.dense_head == "retinanet"):
        return [anchors[:, 2:] - anchors[:, :2] for anchors in detector.anchors]
    shapes = torch.tensor([[2**0.5, 0.5**0.5], [1.0, 1.0], [0.5**0.5, 2**0.5]])
    cells = detector.cells_per_side
    return [number * shapes for number in ([cells] * len(detector.levels) if isinstance(cells, float) else cells)]


def _get_anchors(detector: Detector) -> tuple[Tensor, ...]:
    assert detector.anchors is not None
    return detector.anchors


def _find_nearest_level(student: Detector, teacher: Detector, level: int) -> int:
    """The teacher's level with the stride nearest to that of the student's level, each in its own model pixels."""
    ours = log(student.levels[level].stride[0])
    return min(range(len(teacher.levels)), key=lambda i: abs(ours - log(teacher.levels[i].stride[0])))


def _build_anchor_error(student: Detector, teacher: Detector, level: int, other: int) -> PairError:
    stride = student.levels[level].stride[0]
    ours, theirs = _format_sides(_get_anchors(student)[level]), _format_sides(_get_anchors(teacher)[other])
    return PairError(f"the anchors differ: {theirs} cells in the teacher, {ours} in the student at stride {stride:g}")


def _format_sides(anchors: Tensor) -> str:
    """``3 x 4, 6 x 8``: width and height of each anchor."""
    return ", ".join(f"{w:.3g} x {h:.3g}" for w, h in (anchors[:, 2:] - anchors[:, :2]).tolist())
