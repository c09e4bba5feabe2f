"""What a model of unknown code detected, read from what it returns.

Forms that are known: torchvision's list of dictionaries; boxes, scores and labels as tensors, as exported detectors
give them; the one tensor of YOLO models, before or after suppression; boxes and class scores of each cell; and boxes
and class logits of each query, as DETR's kind gives them. Anything else is not guessed at.

Shapes: N images, D detections, A cells or anchors, K classes; boxes xyxy pixels of the image that the model was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from gdetkd_cli.probing.record import tensors_in
from gdetkd_cli.structures import Detections

# As YOLO models are usually evaluated.
_LEAST_SCORE = 0.001
_NMS_IOU = 0.7
_MOST_CANDIDATES = 30_000  # boxes of one image before suppression
_MOST = 300  # detections of one image
_FIELDS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class OutputForm:
    """How detections are read.

    Attributes:
        name: for people.
        read: (what the model returned, number of images) -> their detections, labels from 1.
    """

    name: str
    read: Callable[[object, int], list[Detections]]


def recognise_form(returned: object, size: tuple[int, int], classes: int | None) -> OutputForm | None:
    """The form of what a model returned for one image; None where it is none of those known.

    Args:
        returned: what it returned.
        size: (height, width) pixels of the image.
        classes: K, where it is known; a YOLO tensor is not read without.
    """
    if _rows(returned) is not None:
        return ROWS
    fields = _fields(returned)
    if fields is not None:
        batched = fields[0].dim() == 3
        return OutputForm(f"tensors of boxes, scores and labels{' by image' if batched else ''}", _read_fields)
    tensors = tensors_in(returned)
    if classes is None:
        return None
    pair = _boxes_and_classes(returned, classes)
    if pair is not None:
        return _pair_form(*pair, size, classes)
    if not tensors or tensors[0].dim() != 3 or not tensors[0].is_floating_point():
        return None
    return _yolo_form(tensors[0].float(), size, classes)


def _rows(returned: object) -> list[Mapping[str, Tensor]] | None:
    """torchvision's list of dictionaries; a scripted detector returns it beside its losses."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Mapping) and not returned[0]:
        returned = returned[1]
    if not isinstance(returned, list | tuple) or not returned:
        return None
    if all(isinstance(row, Mapping) and all(isinstance(row.get(f), Tensor) for f in _FIELDS) for row in returned):
        return list(returned)
    return None


def _read_rows(returned: object, images: int) -> list[Detections]:
    rows = _rows(returned)
    assert rows is not None and len(rows) == images
    return [_kept(row["boxes"], row["scores"], row["labels"]) for row in rows]


ROWS = OutputForm("boxes, scores and labels of each image", _read_rows)  # torchvision's


def _fields(returned: object) -> tuple[Tensor, Tensor, Tensor] | None:
    """Boxes (D, 4) or (N, D, 4), scores and labels without the last axis: by their names, else by their kinds."""
    found: Sequence[Any]
    if isinstance(returned, Mapping) and all(isinstance(returned.get(f), Tensor) for f in _FIELDS):
        found = [returned[f] for f in _FIELDS]
    else:
        tensors = tensors_in(returned)
        if len(tensors) != 3:
            return None
        boxes = [t for t in tensors if t.is_floating_point() and t.dim() in (2, 3) and t.shape[-1] == 4]
        flat = [t for t in tensors if not any(t is b for b in boxes)]
        scores, labels = ([t for t in flat if t.is_floating_point() is kind] for kind in (True, False))
        if not len(boxes) == len(scores) == len(labels) == 1:
            return None
        found = (boxes[0], scores[0], labels[0])
    boxes_, scores_, labels_ = found
    fits = boxes_.dim() in (2, 3) and boxes_.shape[-1] == 4 and boxes_.shape[:-1] == scores_.shape == labels_.shape
    return (boxes_, scores_, labels_) if fits else None


def _read_fields(returned: object, images: int) -> list[Detections]:
    """By image, labels count from 0, as DETR's exports have it; without, from 1, as torchvision's have it."""
    fields = _fields(returned)
    assert fields is not None
    boxes, scores, labels = fields
    if boxes.dim() == 2:
        assert images == 1
        return [_kept(boxes, scores, labels)]
    return [_kept(*one) for one in zip(boxes, scores, labels.long() + 1, strict=True)]


def _yolo_form(raw: Tensor, size: tuple[int, int], classes: int) -> OutputForm | None:
    """One tensor: (N, D, 6) suppressed rows, (N, 4 + K, A), or (N, A, 5 + K) with a score of objectness."""
    _, rows, columns = raw.shape
    whole = columns == 6 and bool((raw[..., 5] == raw[..., 5].round()).all()) and _are_scores(raw[..., 4])
    if whole and bool((raw[..., 5] < classes).all()):
        return OutputForm("rows of box, score and class", _read_suppressed)
    if rows == 4 + classes and columns != 5 + classes:
        cells, objectness = raw.transpose(1, 2), False
    elif columns in (4 + classes, 5 + classes):
        cells, objectness = raw, columns == 5 + classes
    else:
        return None
    if not _are_scores(cells[..., 4:]):
        return None
    # Centres lie all over the image, whatever the model has learnt: a fraction of it, or pixels.
    unit = (1.0, 1.0) if float(cells[..., :2].abs().max()) > 2 else (float(size[1]), float(size[0]))
    scores = "objectness and class scores" if objectness else "class scores"
    read = partial(_read_cells, transposed=rows == 4 + classes, objectness=objectness, unit=unit)
    return OutputForm(f"box and {scores} of each cell", read)


def _boxes_and_classes(returned: object, classes: int) -> tuple[Tensor, Tensor] | None:
    """Boxes (N, Q, 4) and what is said of their classes, (N, Q, K) or (N, Q, K + 1): by name, or the first two."""
    found = list(tensors_in(returned))[:2]
    if isinstance(returned, Mapping) and isinstance(returned.get("pred_boxes"), Tensor):
        found = [returned["pred_boxes"], returned.get("pred_logits", returned.get("logits"))]
    if len(found) != 2 or any(not isinstance(t, Tensor) or t.dim() != 3 or not t.is_floating_point() for t in found):
        return None
    one, other = (t.float() for t in found)
    if one.shape[:2] != other.shape[:2]:
        return None
    pairs = [
        (boxes, said)
        for boxes, said in ((one, other), (other, one))
        if boxes.shape[-1] == 4 and said.shape[-1] in (classes, classes + 1)
    ]
    # With three or four classes both may fit: boxes that are fractions of the image lie in 0..1, logits do not.
    fitting = [pair for pair in pairs if len(pairs) == 1 or (_are_scores(pair[0]) and not _are_scores(pair[1]))]
    return fitting[0] if len(fitting) == 1 else None


def _pair_form(boxes: Tensor, said: Tensor, size: tuple[int, int], classes: int) -> OutputForm | None:
    """Logits of queries, whose boxes are fractions of the image; or scores of cells, whose boxes are xyxy pixels."""
    extra = said.shape[-1] == classes + 1
    if _are_scores(boxes) and not _are_scores(said):
        # Trained for one class or none, most queries say none; trained class by class, none of them says the last.
        none = extra and bool((said.argmax(dim=-1) == classes).float().mean() > 0.5)
        name = f"box and class logits of each query, {'one class or none' if none else 'class by class'}"
        return OutputForm(name, partial(_read_queries, classes=classes, none=none, unit=(size[1], size[0])))
    ordered = bool((boxes[..., 2:] >= boxes[..., :2]).all()) and float(boxes.abs().max()) > 2
    if ordered and not extra and _are_scores(said):
        return OutputForm("box and class scores of each cell", partial(_read_cell_pair, classes=classes))
    return None


def _read_queries(
    returned: object, images: int, *, classes: int, none: bool, unit: tuple[float, float]
) -> list[Detections]:
    pair = _boxes_and_classes(returned, classes)
    assert pair is not None and len(pair[0]) == images
    found = []
    for boxes, logits in zip(*pair, strict=True):
        by_class = (logits.softmax(dim=-1) if none else logits.sigmoid())[:, :classes]
        scores, best = by_class.flatten().topk(min(_MOST, by_class.numel()))
        scores, best = scores[scores > _LEAST_SCORE], best[scores > _LEAST_SCORE]
        corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor(unit * 2)
        found.append(_kept(corners[best // classes], scores, best % classes + 1))
    return found


def _read_cell_pair(returned: object, images: int, *, classes: int) -> list[Detections]:
    pair = _boxes_and_classes(returned, classes)
    assert pair is not None and len(pair[0]) == images
    return [_suppressed_classes(boxes, by_class) for boxes, by_class in zip(*pair, strict=True)]


def _are_scores(values: Tensor) -> bool:
    return bool(((values >= -1e-4) & (values <= 1 + 1e-4)).all())


def _read_suppressed(returned: object, images: int) -> list[Detections]:
    rows = tensors_in(returned)[0].float()
    assert len(rows) == images
    return [_kept(row[:, :4], row[:, 4], row[:, 5].long() + 1) for row in rows]


def _read_cells(
    returned: object, images: int, *, transposed: bool, objectness: bool, unit: tuple[float, float]
) -> list[Detections]:
    raw = tensors_in(returned)[0].float()
    assert len(raw) == images
    return [_suppressed(c, objectness, unit) for c in (raw.transpose(1, 2) if transposed else raw)]


def _suppressed(cells: Tensor, objectness: bool, unit: tuple[float, float]) -> Detections:
    """(A, 4 + K) or (A, 5 + K): centre, width, height, scores -> what is left after suppression, class by class."""
    boxes = box_convert(cells[:, :4], "cxcywh", "xyxy") * cells.new_tensor(unit * 2)
    return _suppressed_classes(boxes, cells[:, 5:] * cells[:, 4:5] if objectness else cells[:, 4:])


def _suppressed_classes(boxes: Tensor, by_class: Tensor) -> Detections:
    """Boxes (A, 4) xyxy and scores (A, K) -> what is left after suppression, class by class."""
    places, labels = (by_class > _LEAST_SCORE).nonzero().unbind(1)  # a cell may say several classes
    scores = by_class[places, labels]
    best = scores.argsort(descending=True, stable=True)[:_MOST_CANDIDATES]
    boxes, scores, labels = boxes[places[best]], scores[best], labels[best]
    kept = batched_nms(boxes, scores, labels, _NMS_IOU)[:_MOST]
    return _kept(boxes[kept], scores[kept], labels[kept] + 1)


def _kept(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """By falling score, without background and padding."""
    order = scores.float().argsort(descending=True, stable=True)
    order = order[(labels[order] > 0) & (scores[order] > 0)]
    return Detections(boxes=boxes[order].float(), scores=scores[order].float(), labels=labels[order].long())
