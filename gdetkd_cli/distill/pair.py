"""What a pair of detectors allows: its kind, prediction distillation, head transfer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.dense import DenseDetector
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.two_stage import TwoStageDetector
from gdetkd_cli.errors import PairError

PairKind = Literal["homogeneous", "heterogeneous"]


def pair_kind(student: Detector, teacher: Detector) -> PairKind:
    """``homogeneous`` when both are two-stage: only then do both have RoI heads to compare (METHOD, section 1)."""
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
    if not (isinstance(student, TwoStageDetector) and isinstance(teacher, TwoStageDetector)):
        raise PairError(
            f"predictions of the RoI heads can be compared between two-stage detectors only; "
            f"this pair is {teacher.family} -> {student.family}"
        )
    if student.box_weights != teacher.box_weights:
        raise PairError(f"the box coders differ: weights {teacher.box_weights} -> {student.box_weights}")
    return class_columns(student, teacher)


def class_map_columns(student: Detector, teacher: Detector) -> Tensor:
    """Checks that the class logits of two dense heads mean the same, cell by cell; returns ``class_columns``.

    Raises:
        PairError: other heads than two RetinaNets or two FCOS, other anchors, or different class lists.
    """
    if not (
        isinstance(student, DenseDetector)
        and isinstance(teacher, DenseDetector)
        and type(student.module) is type(teacher.module)
        and student.anchors is not None
    ):
        raise PairError(
            "logits of dense heads can be compared between two RetinaNets or two FCOS only; this pair is "
            f"{type(teacher.module).__name__} -> {type(student.module).__name__}"
        )
    assert teacher.anchors is not None
    wanted = teacher.anchors[0]
    for anchors in (*student.anchors, *teacher.anchors):
        # Corners are rounded to pixels: up to half a pixel of a cell of four or more.
        if anchors.shape != wanted.shape or float((anchors - wanted).abs().max()) > 0.15:
            raise PairError(f"the anchors differ: {_sides(wanted)} and {_sides(anchors)} cells")
    return class_columns(student, teacher)


def _sides(anchors: Tensor) -> str:
    """``3 x 4, 6 x 8``: width and height of each."""
    return ", ".join(f"{w:.3g} x {h:.3g}" for w, h in (anchors[:, 2:] - anchors[:, :2]).tolist())


def _part(detector: TwoStageDetector, name: str) -> nn.Module:
    """A module of the RoI head; of a cascade's later stages too."""
    found: nn.Module = detector.module.roi_heads.get_submodule(name)
    return found


def _has(detector: TwoStageDetector, name: str) -> bool:
    """Whether the RoI head has such a module; "" is the head itself."""
    return name.rstrip(".") in dict(detector.module.roi_heads.named_modules())


def transfer_head(student: Detector, teacher: Detector) -> list[str]:
    """Copies the teacher's RoI head into the student's; returns the names of the copied parameters.

    The predictor's rows are put in the student's class order.

    Raises:
        PairError: a detector without a RoI head, or any shape or class list that differs; nothing is copied then.
    """
    columns = prediction_columns(student, teacher)
    assert isinstance(student, TwoStageDetector) and isinstance(teacher, TwoStageDetector)
    copies: dict[str, Tensor] = {}
    stages = [stage for stage in ("", "later.0.", "later.1.") if _has(teacher, stage) or _has(student, stage)]
    for part in (stage + layer for stage in stages for layer in ("box_head", "box_predictor")):
        source, target = ({} if not _has(d, part) else _part(d, part).state_dict() for d in (teacher, student))
        for name in sorted(source.keys() | target.keys()):
            shapes = [tuple(state[name].shape) if name in state else None for state in (source, target)]
            if shapes[0] != shapes[1]:
                raise PairError(f"{part}.{name} is {shapes[0]} in the teacher and {shapes[1]} in the student")
            value = source[name]
            # Rows: K + 1 classes, or K + 1 classes x 4 coordinates; a cascade has four, for any class.
            if part.endswith("box_predictor") and (name.startswith("cls_score") or len(value) != 4):
                value = value.unflatten(0, (len(columns), -1))[columns.to(value.device)].flatten(0, 1)
            copies[f"{part}.{name}"] = value
    student.module.roi_heads.load_state_dict(copies, strict=False)
    return sorted(copies)
