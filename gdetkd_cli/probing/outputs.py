"""Reads detections from the output of a model whose code is unknown.

Supported forms: torchvision's list of dictionaries; tensors of boxes, scores and labels, as in exported detectors;
YOLO's single tensor, before or after suppression; boxes and class scores per cell; boxes and class logits per query, as
in DETR. Other forms are not guessed.

Shapes: N images, M detections, A cells, anchors or queries, K classes; boxes are xyxy, pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from gdetkd_cli.probing.record import list_tensors
from gdetkd_cli.structures import Detections

# The usual settings for evaluating YOLO models.
_MIN_SCORE = 0.001
_NMS_IOU = 0.7
_MAX_CANDIDATES = 30_000  # boxes of one image before suppression
_MAX_DETECTIONS = 300  # of one image
_FIELDS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class OutputForm:
    """How detections are read from a model's output.

    Attributes:
        name: shown to the user.
        read: (model's output, number of images) -> detections of each image, labels from 1.
    """

    name: str
    read: Callable[[object, int], list[Detections]]


def recognise_form(returned: object, size: tuple[int, int], classes: int | None) -> OutputForm | None:
    """Recognises the form of a model's output for one image; None if it is unknown.

    Args:
        size: (height, width) pixels of the image.
        classes: K, or None if unknown; only the forms with labels are recognised without it.
    """
    if _find_rows(returned) is not None:
        return ROWS
    fields = _find_fields(returned)
    if fields is not None:
        boxes, scores, labels = fields
        batched = boxes.dim() == 3
        # Boxes as fractions of the image, or labels from 1 beside an axis of images: not one of the known exports.
        fractions = bool((scores > 0).any()) and 0 < float(boxes.max()) <= 1.5
        if fractions or (batched and classes is not None and labels.numel() and int(labels.max()) >= classes):
            return None
        return OutputForm(f"tensors of boxes, scores and labels{' by image' if batched else ''}", _read_fields)
    tensors = list_tensors(returned)
    if classes is None:
        return None
    pair = _find_pair(returned, classes)
    if pair is not None:
        return _recognise_pair(*pair, size, classes)
    if not tensors or tensors[0].dim() != 3 or not tensors[0].is_floating_point():
        return None
    return _recognise_yolo(tensors[0].float(), size, classes)


def _find_rows(returned: object) -> list[Mapping[str, Tensor]] | None:
    """Returns torchvision's list of dictionaries; a scripted detector returns it after its losses."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Mapping) and not returned[0]:
        returned = returned[1]
    if not isinstance(returned, list | tuple) or not returned:
        return None
    if all(isinstance(row, Mapping) and all(isinstance(row.get(f), Tensor) for f in _FIELDS) for row in returned):
        return list(returned)
    return None


def _read_rows(returned: object, images: int) -> list[Detections]:
    rows = _find_rows(returned)
    assert rows is not None and len(rows) == images
    return [_sort_detections(row["boxes"], row["scores"], row["labels"]) for row in rows]


ROWS = OutputForm("boxes, scores and labels of each image", _read_rows)  # torchvision's


def _find_fields(returned: object) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns boxes (M, 4) or (N, M, 4), scores and labels (M,) or (N, M), found by name or else by type and shape."""
    found: Sequence[Any]
    if isinstance(returned, Mapping) and all(isinstance(returned.get(f), Tensor) for f in _FIELDS):
        found = [returned[f] for f in _FIELDS]
    else:
        tensors = list_tensors(returned)
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
    """Labels count from 0 if there is an axis of images, as in DETR's exports; else from 1, as in torchvision's."""
    fields = _find_fields(returned)
    assert fields is not None
    boxes, scores, labels = fields
    if boxes.dim() == 2:
        assert images == 1
        return [_sort_detections(boxes, scores, labels)]
    return [_sort_detections(*one) for one in zip(boxes, scores, labels.long() + 1, strict=True)]


def _recognise_yolo(raw: Tensor, size: tuple[int, int], classes: int) -> OutputForm | None:
    """Recognises (N, M, 6) suppressed rows, (N, 4 + K, A), or (N, A, 4 + K or 5 + K), the latter with objectness."""
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
    # Centres cover the whole image, even before training, so their range shows whether they are fractions or pixels.
    unit = (1.0, 1.0) if float(cells[..., :2].abs().max()) > 2 else (float(size[1]), float(size[0]))
    reach = [float(cells[..., axis].max()) * unit[axis] for axis in (0, 1)]
    if bool((cells[..., 2:4] < 0).any()) or reach[0] < size[1] / 2 or reach[1] < size[0] / 2:
        return None  # offsets in cells and logarithms of sizes, as YOLOX writes them without decoding
    scores = "objectness and class scores" if objectness else "class scores"
    read = partial(_read_cells, transposed=rows == 4 + classes, objectness=objectness, unit=unit)
    return OutputForm(f"box and {scores} of each cell", read)


def _find_pair(returned: object, classes: int) -> tuple[Tensor, Tensor] | None:
    """Returns boxes (N, A, 4) and class scores or logits (N, A, K or K + 1), by name or as the first two tensors."""
    found = list(list_tensors(returned))[:2]
    if isinstance(returned, Mapping) and isinstance(returned.get("pred_boxes"), Tensor):
        found = [returned["pred_boxes"], returned.get("pred_logits", returned.get("logits"))]
    if len(found) != 2 or any(not isinstance(t, Tensor) or t.dim() != 3 or not t.is_floating_point() for t in found):
        return None
    one, other = (t.float() for t in found)
    if one.shape[:2] != other.shape[:2]:
        return None
    pairs = [
        (boxes, by_class)
        for boxes, by_class in ((one, other), (other, one))
        if boxes.shape[-1] == 4 and by_class.shape[-1] in (classes, classes + 1)
    ]
    # With 3 or 4 classes both orders may fit: boxes as fractions of the image lie in 0..1, logits do not.
    fitting = [pair for pair in pairs if len(pairs) == 1 or (_are_scores(pair[0]) and not _are_scores(pair[1]))]
    return fitting[0] if len(fitting) == 1 else None


def _recognise_pair(boxes: Tensor, by_class: Tensor, size: tuple[int, int], classes: int) -> OutputForm | None:
    """Recognises logits of queries, with boxes as fractions of the image, or scores of cells, with xyxy pixels."""
    extra = by_class.shape[-1] == classes + 1
    if _are_scores(boxes) and not _are_scores(by_class):
        # With softmax over the classes and "none", most queries predict "none"; with sigmoids, no query does.
        none = extra and bool((by_class.argmax(dim=-1) == classes).float().mean() > 0.5)
        name = f"box and class logits of each query, {'one class or none' if none else 'class by class'}"
        return OutputForm(name, partial(_read_queries, classes=classes, none=none, unit=(size[1], size[0])))
    ordered = bool((boxes[..., 2:] >= boxes[..., :2]).all()) and float(boxes.abs().max()) > 2
    if ordered and not extra and _are_scores(by_class):
        return OutputForm("box and class scores of each cell", partial(_read_cell_pair, classes=classes))
    return None


def _read_queries(
    returned: object, images: int, *, classes: int, none: bool, unit: tuple[float, float]
) -> list[Detections]:
    pair = _find_pair(returned, classes)
    assert pair is not None and len(pair[0]) == images
    found = []
    for boxes, logits in zip(*pair, strict=True):
        by_class = (logits.softmax(dim=-1) if none else logits.sigmoid())[:, :classes]
        scores, best = by_class.flatten().topk(min(_MAX_DETECTIONS, by_class.numel()))
        scores, best = scores[scores > _MIN_SCORE], best[scores > _MIN_SCORE]
        corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor(unit * 2)
        found.append(_sort_detections(corners[best // classes], scores, best % classes + 1))
    return found


def _read_cell_pair(returned: object, images: int, *, classes: int) -> list[Detections]:
    pair = _find_pair(returned, classes)
    assert pair is not None and len(pair[0]) == images
    return [_suppress_by_class(boxes, by_class) for boxes, by_class in zip(*pair, strict=True)]


def _are_scores(values: Tensor) -> bool:
    return bool(((values >= -1e-4) & (values <= 1 + 1e-4)).all())


def _read_suppressed(returned: object, images: int) -> list[Detections]:
    rows = list_tensors(returned)[0].float()
    assert len(rows) == images
    return [_sort_detections(row[:, :4], row[:, 4], row[:, 5].long() + 1) for row in rows]


def _read_cells(
    returned: object, images: int, *, transposed: bool, objectness: bool, unit: tuple[float, float]
) -> list[Detections]:
    raw = list_tensors(returned)[0].float()
    assert len(raw) == images
    found = []
    for cells in raw.transpose(1, 2) if transposed else raw:  # (A, 4 + K or 5 + K): centre, width, height, scores
        boxes = box_convert(cells[:, :4], "cxcywh", "xyxy") * cells.new_tensor(unit * 2)
        found.append(_suppress_by_class(boxes, cells[:, 5:] * cells[:, 4:5] if objectness else cells[:, 4:]))
    return found


def _suppress_by_class(boxes: Tensor, by_class: Tensor) -> Detections:
    """Suppresses overlapping boxes (A, 4) xyxy with scores (A, K), class by class."""
    places, labels = (by_class > _MIN_SCORE).nonzero().unbind(1)  # a cell may predict several classes
    scores = by_class[places, labels]
    best = scores.argsort(descending=True, stable=True)[:_MAX_CANDIDATES]
    boxes, scores, labels = boxes[places[best]], scores[best], labels[best]
    kept = batched_nms(boxes, scores, labels, _NMS_IOU)[:_MAX_DETECTIONS]
    return _sort_detections(boxes[kept], scores[kept], labels[kept] + 1)


def _sort_detections(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """Sorts by falling score and drops background and padding."""
    order = scores.float().argsort(descending=True, stable=True)
    order = order[(labels[order] > 0) & (scores[order] > 0)]
    return Detections(boxes=boxes[order].float(), scores=scores[order].float(), labels=labels[order].long())
