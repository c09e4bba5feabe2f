"""Head transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gdetkd_cli.detectors.compatibility import match_class_maps
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.distill.transfer import transfer_head
from gdetkd_cli.errors import PairError

STUDENT, TEACHER = ("circle", "square", "triangle"), ("triangle", "circle", "square")
COLUMNS = [0, 2, 3, 1]  # of the teacher, for background, circle, square and triangle

TinyDetector = Callable[..., Detector]


def head_of(detector: Detector) -> Any:
    module: Any = detector.module
    return module.roi_heads


def weights_of(detector: Detector) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in detector.module.state_dict().items()}


def find_changed(detector: Detector, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in detector.module.state_dict().items() if not torch.equal(value, before[name])}


def set_anchors(detector: Detector, cells: Sequence[float]) -> None:
    """Sets one square anchor per level, in cells."""
    module: Any = detector.module
    module.anchor_generator.cell_anchors = [
        torch.tensor([[-side, -side, side, side]]) * level.stride[0] / 2
        for side, level in zip(cells, detector.levels, strict=True)
    ]


def test_transfer_copies_the_whole_head(tiny_detector: TinyDetector) -> None:
    student, teacher = tiny_detector("faster-rcnn", seed=0), tiny_detector("faster-rcnn", seed=1)
    before, of_teacher = weights_of(student), weights_of(teacher)
    copied = transfer_head(student, teacher)

    assert copied == sorted(copied)
    parts = ("box_head.fc6", "box_head.fc7", "box_predictor.cls_score", "box_predictor.bbox_pred")
    assert set(copied) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert {name.removeprefix("roi_heads.") for name in find_changed(student, before)} == set(copied)
    pooled = torch.rand(5, 16, 7, 7)
    ours, theirs = (head.box_predictor(head.box_head(pooled)) for head in (head_of(student), head_of(teacher)))
    assert all(map(torch.equal, ours, theirs))
    assert not find_changed(teacher, of_teacher)


def test_transfer_is_a_copy(tiny_detector: TinyDetector) -> None:
    student, teacher = tiny_detector("faster-rcnn", seed=0), tiny_detector("faster-rcnn", seed=1)
    transfer_head(student, teacher)
    of_teacher = weights_of(teacher)
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(1)

    assert not find_changed(teacher, of_teacher)


def test_transfer_puts_rows_in_the_students_order(tiny_detector: TinyDetector) -> None:
    student = tiny_detector("faster-rcnn", classes=STUDENT)
    teacher = tiny_detector("faster-rcnn", classes=TEACHER, seed=1)
    transfer_head(student, teacher)
    pooled = torch.rand(5, 16, 7, 7)

    logits, deltas = head_of(student).box_predictor(head_of(student).box_head(pooled))
    expected_logits, expected_deltas = head_of(teacher).box_predictor(head_of(teacher).box_head(pooled))
    torch.testing.assert_close(logits, expected_logits[:, COLUMNS])
    torch.testing.assert_close(deltas.view(5, 4, 4), expected_deltas.view(5, 4, 4)[:, COLUMNS])


def test_transfer_copies_every_stage_of_a_cascade(tiny_detector: TinyDetector) -> None:
    student = tiny_detector("cascade-rcnn", classes=STUDENT)
    teacher = tiny_detector("cascade-rcnn", classes=TEACHER, seed=1)
    assert len(transfer_head(student, teacher)) == 3 * 8
    pooled = torch.rand(5, 16, 7, 7)
    stages = [(head_of(detector), *head_of(detector).later) for detector in (student, teacher)]
    for ours, theirs in zip(*stages, strict=True):
        logits, deltas = ours.box_predictor(ours.box_head(pooled))
        expected_logits, expected_deltas = theirs.box_predictor(theirs.box_head(pooled))
        torch.testing.assert_close(logits, expected_logits[:, COLUMNS])
        torch.testing.assert_close(deltas, expected_deltas)  # four numbers for whatever class


def test_a_cascade_and_a_single_head_do_not_transfer(tiny_detector: TinyDetector) -> None:
    for teacher, student in (("cascade-rcnn", "faster-rcnn"), ("faster-rcnn", "cascade-rcnn")):
        with pytest.raises(PairError, match=r"box_predictor.bbox_pred.bias is"):
            transfer_head(tiny_detector(student), tiny_detector(teacher))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arguments": {"representation_size": 24}}, r"box_head.fc6.bias is \(24,\) in the teacher and \(32,\)"),
        ({"pyramid_channels": 24}, r"box_head.fc6.weight is \(32, 1176\) in the teacher and \(32, 784\)"),
    ],
)
def test_nothing_is_copied_where_a_shape_differs(
    fields: dict[str, Any], message: str, tiny_detector: TinyDetector
) -> None:
    student, teacher = tiny_detector("faster-rcnn"), tiny_detector("faster-rcnn", seed=1, **fields)
    before = weights_of(student)
    with pytest.raises(PairError, match=message):
        transfer_head(student, teacher)

    assert not find_changed(student, before)


def test_nothing_is_copied_where_classes_differ(tiny_detector: TinyDetector) -> None:
    student = tiny_detector("faster-rcnn")
    before = weights_of(student)
    with pytest.raises(PairError, match="the class lists differ"):
        transfer_head(student, tiny_detector("faster-rcnn", seed=1, classes=("circle", "square", "star")))

    assert not find_changed(student, before)


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_a_dense_head_is_copied_whole(family: str, tiny_detector: TinyDetector) -> None:
    student = tiny_detector(family, classes=STUDENT)
    teacher = tiny_detector(family, classes=TEACHER, seed=1)
    before = weights_of(student)
    copied = set(transfer_head(student, teacher))
    assert find_changed(student, before) <= copied  # a norm's weights are ones in both
    assert copied == {name for name in before if name.startswith("head.")}

    maps = [torch.rand(2, 16, size, size) for size in (8, 4)]
    ours, theirs = ({**head(maps)} for head in (student.module.head, teacher.module.head))  # type: ignore[operator]
    torch.testing.assert_close(ours.pop("cls_logits"), theirs.pop("cls_logits")[..., COLUMNS])
    for name, values in ours.items():  # boxes and centreness, for whatever class
        torch.testing.assert_close(values, theirs[name])


def test_a_dense_head_of_another_shape_is_not_copied(tiny_detector: TinyDetector) -> None:
    student, teacher = tiny_detector("fcos"), tiny_detector("fcos", seed=1, pyramid_channels=24)
    before = weights_of(student)
    with pytest.raises(
        PairError, match=r"head.classification_head.cls_logits.weight is \(4, 24, 3, 3\) in the teacher"
    ):
        transfer_head(student, teacher)
    assert not find_changed(student, before)


def test_a_dense_head_meets_the_anchors_that_it_learnt(tiny_detector: TinyDetector) -> None:
    """Anchors differ between levels, and the student's levels have them in the opposite order."""
    student, teacher = tiny_detector("retinanet"), tiny_detector("retinanet", seed=1)
    upwards = [3.0 + level for level in range(len(student.levels))]
    set_anchors(student, upwards)
    set_anchors(teacher, upwards[::-1])
    assert match_class_maps(student, teacher).tolist() == [0, 1, 2, 3]  # each has its like somewhere
    with pytest.raises(
        PairError, match=rf"the anchors differ: {upwards[-1]:g} x .* in the teacher, 3 x 3 in the student"
    ):
        transfer_head(student, teacher)
    set_anchors(student, upwards[::-1])
    transfer_head(student, teacher)


def test_transfer_needs_two_heads_of_a_kind(tiny_detector: TinyDetector) -> None:
    with pytest.raises(PairError, match="RetinaNet -> FCOS"):
        transfer_head(tiny_detector("fcos"), tiny_detector("retinanet"))


def test_transfer_needs_two_roi_heads(tiny_detector: TinyDetector) -> None:
    with pytest.raises(PairError, match="two-stage -> dense"):
        transfer_head(tiny_detector("retinanet"), tiny_detector("faster-rcnn"))
