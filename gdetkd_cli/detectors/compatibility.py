"""What a pair of detectors allows: its kind, prediction distillation, head transfer."""

from __future__ import annotations

from math import log
from typing import Literal

import torch
from torch import Tensor

from gdetkd_cli.detectors.pooling import DENSE_CELLS
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import PairError

PairKind = Literal["homogeneous", "heterogeneous"]


def pair_kind(student: Detector, teacher: Detector) -> PairKind:
    """``homogeneous`` when both are two-stage: only then do both have RoI heads to compare."""
    both = student.family == teacher.family == "two-stage"
    return "homogeneous" if both else "heterogeneous"


def class_columns(student: Detector, teacher: Detector) -> Tensor:
    """(K + 1,) int64: the teacher's output column for each of the student's, by class name; background is 0.

    Raises:
        PairError: the class lists hold different names.
    """
    missing = sorted(set(student.class_names) - set(teacher.class_names))
    extra = sorted(set(teacher.class_names) - set(student.class_names))
    if missing or extra:
        only = [f"only the student has {missing[:3]}"] * bool(missing) + [f"only the teacher has {extra[:3]}"] * bool(
            extra
        )
        raise PairError(f"the class lists differ: {'; '.join(only)}")
    return torch.tensor([0] + [teacher.class_names.index(name) + 1 for name in student.class_names])


def prediction_columns(student: Detector, teacher: Detector) -> Tensor:
    """Checks that the two RoI heads' predictions can be compared; returns ``class_columns``.

    Raises:
        PairError: a detector without a RoI head, different class lists, or different box coders.
    """
    if student.box_weights is None or teacher.box_weights is None:
        raise PairError(
            f"predictions of the RoI heads can be compared between two-stage detectors only; "
            f"this pair is {teacher.family} -> {student.family}"
        )
    if student.box_weights != teacher.box_weights:
        raise PairError(f"the box coders differ: weights {teacher.box_weights} -> {student.box_weights}")
    return class_columns(student, teacher)


def stage_weights(student: Detector, teacher: Detector) -> tuple[float, ...]:
    """The student's weights of the later stages, where both detectors are cascades of the same stages; else none."""
    return student.later_weights if student.later_box_weights == teacher.later_box_weights else ()


def class_map_columns(student: Detector, teacher: Detector) -> Tensor:
    """Checks that the two dense heads say the same kind of thing of a cell; returns ``class_columns``.

    Raises:
        PairError: other heads than two RetinaNets or two FCOS, anchors that no level of the teacher has, or different
            class lists.
    """
    if not _dense_alike(student, teacher):
        raise PairError(
            "heads can be compared cell by cell between two RetinaNets or two FCOS only; this pair is "
            f"{type(teacher.module).__name__} -> {type(student.module).__name__}"
        )
    agree = agreeing_anchors(student, teacher)
    for level in range(len(agree)):
        if not agree[level].any():
            raise _anchors_differ(student, teacher, level, _nearest_stride(student, teacher, level))
    return class_columns(student, teacher)


def agreeing_anchors(student: Detector, teacher: Detector) -> Tensor:
    """(L_student, L_teacher) bool: whether two levels of a pair that ``class_map_columns`` accepts have the same
    anchors, in cells."""
    ours, theirs = _anchors(student), _anchors(teacher)
    # Corners are rounded to pixels: up to half a pixel of a cell of four or more.
    return torch.tensor(
        [[a.shape == b.shape and float((a.cpu() - b.cpu()).abs().max()) <= 0.15 for b in theirs] for a in ours]
    )


def check_anchors(student: Detector, teacher: Detector) -> None:
    """A head that reads all levels must meet the boxes that it learnt to judge at a level of that stride.

    Raises:
        PairError: the teacher's level of the nearest stride, in pixels that each network sees, has other anchors.
    """
    agree = agreeing_anchors(student, teacher)
    for level in range(len(agree)):
        if not agree[level, other := _nearest_stride(student, teacher, level)]:
            raise _anchors_differ(student, teacher, level, other)


def level_shapes(detector: Detector) -> list[Tensor]:
    """By level (A, 2), width and height in cells of the boxes that a level is for: its anchors. Where a detector has
    none that say so (FCOS, SSD, a module of one's own): the middle of what a dense level is for, in three shapes."""
    if detector.anchors is not None and (detector.family == "two-stage" or detector.dense_head == "retinanet"):
        return [anchors[:, 2:] - anchors[:, :2] for anchors in detector.anchors]
    shapes = DENSE_CELLS * torch.tensor([[2**0.5, 0.5**0.5], [1.0, 1.0], [0.5**0.5, 2**0.5]])
    return [shapes for _ in detector.levels]


def _dense_alike(student: Detector, teacher: Detector) -> bool:
    """Two RetinaNets or two FCOS."""
    return student.dense_head is not None and student.dense_head == teacher.dense_head


def _anchors(detector: Detector) -> tuple[Tensor, ...]:
    assert detector.anchors is not None
    return detector.anchors


def _nearest_stride(student: Detector, teacher: Detector, level: int) -> int:
    """The teacher's level whose stride, in pixels that each network sees, is nearest to that of the student's."""
    ours = log(student.levels[level].stride[0])
    return min(range(len(teacher.levels)), key=lambda i: abs(ours - log(teacher.levels[i].stride[0])))


def _anchors_differ(student: Detector, teacher: Detector, level: int, other: int) -> PairError:
    stride = student.levels[level].stride[0]
    ours, theirs = _sides(_anchors(student)[level]), _sides(_anchors(teacher)[other])
    return PairError(f"the anchors differ: {theirs} cells in the teacher, {ours} in the student at stride {stride:g}")


def _sides(anchors: Tensor) -> str:
    """``3 x 4, 6 x 8``: width and height of each."""
    return ", ".join(f"{w:.3g} x {h:.3g}" for w, h in (anchors[:, 2:] - anchors[:, :2]).tolist())
