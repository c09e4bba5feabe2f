"""Detections read from hand-made outputs of unknown models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdetkd_cli.probing.outputs import recognise_form
from gdetkd_cli.structures import Detections

SIZE = (64, 96)
BOXES = torch.tensor([[2.0, 4, 12, 24], [30, 10, 50, 40], [5, 5, 9, 9]])
SCORES = torch.tensor([0.3, 0.9, 0.6])


def read(returned: object, *, classes: int | None = None, images: int = 1) -> tuple[str, list[Detections]]:
    form = recognise_form(returned, SIZE, classes)
    assert form is not None
    return form.name, form.read(returned, images)


def assert_detections(one: Detections, boxes: Tensor, scores: list[float], labels: list[int]) -> None:
    torch.testing.assert_close(one.boxes, boxes)
    torch.testing.assert_close(one.scores, torch.tensor(scores))
    assert one.labels.tolist() == labels
    assert one.labels.dtype == torch.int64


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_torchvisions_rows(scripted: bool) -> None:
    row = {"boxes": BOXES, "scores": SCORES, "labels": torch.tensor([3, 1, 0])}
    empty = {"boxes": BOXES[:0], "scores": SCORES[:0], "labels": torch.zeros(0, dtype=torch.int64)}
    rows = [row, empty]
    name, found = read(({}, rows) if scripted else rows, images=2)

    assert name == "boxes, scores and labels of each image"
    assert_detections(found[0], BOXES[[1, 0]], [0.9, 0.3], [1, 3])  # by falling score, without background
    assert len(found[1].scores) == 0


def test_three_tensors_count_labels_from_1_as_torchvision_does() -> None:
    labels = torch.tensor([3, 1, 2])
    for returned in ((BOXES, labels, SCORES), {"labels": labels, "boxes": BOXES, "scores": SCORES}):
        _, (one,) = read(returned)
        assert_detections(one, BOXES[[1, 2, 0]], [0.9, 0.6, 0.3], [1, 2, 3])


def test_three_tensors_by_image_count_labels_from_0_as_detr_does() -> None:
    returned = (torch.tensor([[2, 0, 1]]), BOXES[None], SCORES[None])
    _, (one,) = read(returned)
    assert_detections(one, BOXES[[1, 2, 0]], [0.9, 0.6, 0.3], [1, 2, 3])


def cells(*rows: list[float]) -> Tensor:
    """(1, A, C)."""
    return torch.tensor([rows])


# Classes count from 0: two cells predict one object of class 2, one cell predicts classes 0 and 1, the last nothing.
CELLS = cells(
    [40.0, 25, 20, 30, 0.0, 0.0, 0.9],
    [41.0, 25, 20, 30, 0.0, 0.0, 0.8],
    [7.0, 14, 10, 20, 0.7, 0.2, 0.0],
    [80.0, 50, 10, 10, 0.0, 0.0, 0.0005],
)
KEPT = torch.tensor([[30.0, 10, 50, 40], [2, 4, 12, 24], [2, 4, 12, 24]])


@pytest.mark.parametrize("transposed", [False, True])
def test_class_scores_of_each_cell(transposed: bool) -> None:
    returned = CELLS.transpose(1, 2) if transposed else CELLS
    name, (one,) = read([returned, [torch.rand(1, 8, 4, 4)]], classes=3)  # the maps after it are ignored

    assert name == "box and class scores of each cell"
    assert_detections(one, KEPT, [0.9, 0.7, 0.2], [3, 1, 2])


def test_objectness_multiplies() -> None:
    returned = torch.cat([CELLS[..., :4], torch.tensor([[0.5], [0.5], [1.0], [0.0]])[None], CELLS[..., 4:]], dim=2)
    name, (one,) = read(returned, classes=3)

    assert name == "box and objectness and class scores of each cell"
    assert_detections(one, KEPT[[1, 0, 2]], [0.7, 0.45, 0.2], [1, 3, 2])


def test_boxes_as_fractions_of_the_image() -> None:
    fractions = CELLS.clone()
    fractions[..., :4] /= torch.tensor([SIZE[1], SIZE[0]] * 2)
    _, (one,) = read(fractions, classes=3)
    assert_detections(one, KEPT, [0.9, 0.7, 0.2], [3, 1, 2])


def test_suppressed_rows() -> None:
    returned = torch.cat([BOXES, SCORES[:, None], torch.tensor([[2.0], [0], [1]])], dim=1)[None]
    name, (one,) = read(returned, classes=3)

    assert name == "rows of box, score and class"
    assert_detections(one, BOXES[[1, 2, 0]], [0.9, 0.6, 0.3], [1, 2, 3])


@pytest.mark.parametrize(
    ("returned", "classes"),
    [
        (CELLS, None),  # the meaning of the columns depends on the classes
        (CELLS, 5),
        (CELLS * 3, 3),  # no scores
        (torch.rand(1, 3, 4, 4), 3),
        ([torch.rand(1, 3, 9), torch.rand(1, 3, 4)], 3),  # DETR's logits and boxes
        ([], 3),
        (torch.cat([torch.randn(1, 9, 4), torch.rand(1, 9, 3)], dim=2), 3),  # YOLOX without decoding
        (torch.cat([torch.rand(1, 9, 4) * 3, torch.rand(1, 9, 3)], dim=2), 3),  # centres in one corner
        ((BOXES[None] / 100, SCORES[None], torch.tensor([[1, 2, 1]])), 3),  # fractions, whose labels may start at 1
        ((BOXES[None], SCORES[None], torch.tensor([[1, 2, 3]])), 3),  # labels from 1
        ([{"boxes": BOXES, "scores": SCORES}], 3),
        ("text", 3),
    ],
)
def test_unknown_forms_are_not_guessed(returned: object, classes: int | None) -> None:
    assert recognise_form(returned, SIZE, classes) is None


# Three queries on an image of 64 x 96 pixels: class 1 (from 0), class 0, nothing.
QUERY_BOXES = cells([0.5, 0.5, 0.25, 0.5], [0.25, 0.25, 0.125, 0.25], [0.5, 0.5, 1.0, 1.0])
QUERY_PIXELS = torch.tensor([[36.0, 16, 60, 48], [18, 8, 30, 24], [0, 0, 96, 64]])


def test_query_logits_with_softmax_as_in_detr() -> None:
    nothing = 100.0
    logits = cells([-nothing, 2.0, -nothing, 1.0], [0.0, -nothing, -nothing, 1.0], [-nothing, -nothing, -nothing, 1.0])
    for returned in ({"logits": logits, "pred_boxes": QUERY_BOXES}, (logits, QUERY_BOXES), (QUERY_BOXES, logits)):
        name, (one,) = read(returned, classes=3)
        assert name == "box and class logits of each query, one class or none"
        e = torch.e
        assert_detections(
            one, QUERY_PIXELS[:2], [e / (e + 1), 1 / (e + 1)], [2, 1]
        )  # softmax over the classes and none


@pytest.mark.parametrize("extra", [0, 1])
def test_query_logits_with_sigmoids_as_in_deformable_detr(extra: int) -> None:
    logits = torch.full((1, 3, 3 + extra), -100.0)
    logits[0, 0, 1], logits[0, 1, 0], logits[0, 1, 2] = 0.0, 3.0, 1.0
    name, (one,) = read({"pred_logits": logits, "pred_boxes": QUERY_BOXES}, classes=3)

    assert name == "box and class logits of each query, class by class"
    scores = torch.tensor([3.0, 1.0, 0.0]).sigmoid().tolist()
    assert_detections(one, QUERY_PIXELS[[1, 1, 0]], scores, [1, 3, 2])  # a query may predict two classes


def test_boxes_and_class_scores_of_cells_in_two_tensors() -> None:
    boxes = torch.tensor([[[30.0, 10, 50, 40], [31, 10, 51, 40], [2, 4, 12, 24]]])
    scores = cells([0.0, 0.9, 0.0], [0.0, 0.8, 0.0], [0.7, 0.2, 0.0])
    name, (one,) = read([boxes, scores, torch.rand(1, 68, 4, 4)], classes=3)

    assert name == "box and class scores of each cell"
    assert_detections(one, boxes[0][[0, 2, 2]], [0.9, 0.7, 0.2], [2, 1, 2])


def test_ambiguous_pairs_are_not_guessed() -> None:
    assert recognise_form((torch.rand(1, 5, 4), torch.rand(1, 5, 4)), SIZE, 4) is None
    assert recognise_form((torch.randn(1, 5, 4) * 9, torch.randn(1, 5, 6)), SIZE, 6) is None  # boxes of an unknown form
