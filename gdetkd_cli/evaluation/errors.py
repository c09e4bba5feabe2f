"""Errors of detections by type, and what each type costs in AP50 (TIDE, ECCV 2020, arXiv 2008.08115).

Shapes: D detections of one image or P of all images, G objects, K classes. Boxes are xyxy pixels of the stored image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from gdetkd_cli.data.split import Record
from gdetkd_cli.structures import Detections

ERRORS = ("class", "location", "class and location", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1  # TIDE's t_f and t_b
_HIT, _CLASS, _LOCATION, _BOTH, _DUPLICATE, _BACKGROUND, _CROWD = range(-1, 6)
_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST = 100  # detections per image and class, as in COCO


@dataclass(frozen=True)
class Matches:
    """The detections of a split, matched with the truth at IoU 0.5 like the COCO benchmark.

    Attributes:
        scores: (P,) in 0..1; detections on a crowd are left out.
        labels: (P,) in 1..K.
        kinds: (P,) -1 for a hit, else the index of the error's type in ``ERRORS``.
        repaired: (P,) the label with which a class or location error becomes a hit if this error alone is repaired;
            0: it cannot, because the object is found already, or by a better detection with the same error.
        image: (P,) index of the image among the records.
        objects: (K + 1,) number of objects by label, without crowds.
        missed: (K + 1,) objects that no detection hits, and that no class or location error is about.
    """

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    kinds: NDArray[np.int64]
    repaired: NDArray[np.int64]
    image: NDArray[np.int64]
    objects: NDArray[np.int64]
    missed: NDArray[np.int64]
    images: int

    @property
    def hits(self) -> NDArray[np.bool_]:
        """(P,) whether a detection is a hit."""
        return self.kinds == _HIT


@dataclass(frozen=True)
class ErrorReport:
    """Errors by type, under the names in ``ERRORS``.

    Attributes:
        ap50: AP at IoU 0.5, in 0-100.
        costs: dAP, by how much AP50 rises if all errors of this type, and no others, are repaired.
        counts: number of errors among the detections with at least ``min_score``; missed: objects.
    """

    ap50: float
    costs: dict[str, float]
    counts: dict[str, int]
    min_score: float


def read_truth(record: Record) -> tuple[Tensor, Tensor, Tensor]:
    """The objects of an image: boxes (G, 4), labels (G,), and whether each is a crowd (G,)."""
    boxes = torch.tensor([item["bbox"] for item in record.truth], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([item["category_id"] for item in record.truth], dtype=torch.int64)
    crowds = torch.tensor([bool(item.get("iscrowd", 0)) for item in record.truth], dtype=torch.bool)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1), labels, crowds


def match_split(records: Sequence[Record], classes: int, predictions: Mapping[int, Detections]) -> Matches:
    """Matches all images and gives each detection its type.

    Args:
        classes: K.
        predictions: by image id; a missing image has no detections.
    """
    objects, missed = np.zeros(classes + 1, dtype=np.int64), np.zeros(classes + 1, dtype=np.int64)
    rows: list[Tensor] = [torch.zeros(0, 5, dtype=torch.float64)]
    for place, record in enumerate(records):
        boxes, labels, crowds = read_truth(record)
        np.add.at(objects, labels[~crowds].numpy(), 1)
        found = _keep_best(predictions.get(record.image_id))
        kinds, repaired, lost = _match_image(found, boxes[~crowds], labels[~crowds], (boxes[crowds], labels[crowds]))
        np.add.at(missed, labels[~crowds][lost].numpy(), 1)
        columns = (found.scores, found.labels, kinds, repaired, torch.full_like(kinds, place))
        rows.append(torch.stack([column.double() for column in columns], dim=1)[kinds != _CROWD])
    table = torch.cat(rows).numpy()
    table = table[np.argsort(-table[:, 0], kind="stable")]
    found_labels, kinds_, repaired_, image = table[:, 1:].astype(np.int64).T
    return Matches(table[:, 0], found_labels, kinds_, repaired_, image, objects, missed, len(records))


def measure_errors(matches: Matches) -> ErrorReport:
    """Computes dAP of every type, and counts errors at the score with the best F1."""
    hits, kinds = matches.hits, matches.kinds
    ap50 = _mean_ap(matches.scores, matches.labels, hits, matches.objects)
    aps = {}
    for kind, name in enumerate(ERRORS[:-1]):
        mended = (kinds == kind) & (matches.repaired > 0)
        kept = (kinds != kind) | mended
        labels = np.where(mended, matches.repaired, matches.labels)
        aps[name] = _mean_ap(matches.scores[kept], labels[kept], (hits | mended)[kept], matches.objects)
    aps["missed"] = _mean_ap(matches.scores, matches.labels, hits, matches.objects - matches.missed)
    least = find_best_score(matches)
    sure = matches.scores >= least
    counts = {name: int((sure & (kinds == kind)).sum()) for kind, name in enumerate(ERRORS[:-1])}
    counts["missed"] = int(matches.objects.sum() - (sure & hits).sum())
    return ErrorReport(ap50, {name: ap - ap50 for name, ap in aps.items()}, counts, least)


def find_best_score(matches: Matches) -> float:
    """The lowest score to keep, for the best F1 of all classes together; 0.5 if nothing is hit."""
    hits = np.cumsum(matches.hits)
    if not len(hits) or not hits[-1]:
        return 0.5
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + matches.objects.sum())
    return float(matches.scores[f1.argmax()])


def _keep_best(found: Detections | None) -> Detections:
    """One image's detections by falling score, at most 100 of each class."""
    if found is None:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    order = found.scores.argsort(descending=True, stable=True)
    kept = []
    for label in found.labels.unique().tolist():
        kept.append(order[found.labels[order] == label][:_MOST])
    rows = torch.cat([*kept, order[:0]])
    rows = rows[found.scores[rows].argsort(descending=True, stable=True)]
    return Detections(found.boxes[rows].float(), found.scores[rows], found.labels[rows])


def _match_image(
    found: Detections, boxes: Tensor, labels: Tensor, crowds: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the kinds (D,), the repaired labels (D,), and which objects are missed (G,)."""
    kinds = torch.full((len(found.scores),), _BACKGROUND)
    if not len(kinds):
        return kinds, kinds.clone(), torch.ones(len(boxes), dtype=torch.bool)
    kinds[_find_on_crowd(found, *crowds)] = _CROWD
    if not len(boxes):
        return kinds, torch.zeros_like(kinds), torch.ones(0, dtype=torch.bool)
    iou = box_iou(found.boxes, boxes)
    same = found.labels[:, None] == labels
    own, other = iou * same, iou * ~same
    hit, matched = _match_greedily(own)
    open_ = ~hit & (kinds != _CROWD)
    # A later assignment replaces an earlier one, so the type that TIDE tests first comes last.
    kinds[open_ & (iou.amax(dim=1) > BACKGROUND)] = _BOTH
    kinds[open_ & (own.amax(dim=1) >= FOREGROUND)] = _DUPLICATE
    kinds[open_ & (other.amax(dim=1) >= FOREGROUND)] = _CLASS
    kinds[open_ & (own.amax(dim=1) >= BACKGROUND) & (own.amax(dim=1) < FOREGROUND)] = _LOCATION
    kinds[hit] = _HIT
    repaired, lost = torch.zeros_like(kinds), ~matched
    for kind, overlap in ((_CLASS, other), (_LOCATION, own)):
        taken = matched.clone()
        rows = (kinds == kind).nonzero().flatten()
        goals = overlap[rows].argmax(dim=1)
        lost[goals] = False
        for row, goal in zip(rows.tolist(), goals.tolist(), strict=True):
            if not taken[goal]:
                taken[goal], repaired[row] = True, labels[goal]
    return kinds, repaired, lost


def _match_greedily(own: Tensor) -> tuple[Tensor, Tensor]:
    """Matches (D, G) overlaps of equal classes by falling score; returns the hits (D,) and the found objects (G,)."""
    hit, matched = torch.zeros(len(own), dtype=torch.bool), torch.zeros(own.shape[1], dtype=torch.bool)
    for row in (own.amax(dim=1) >= FOREGROUND).nonzero().flatten().tolist():
        overlap, goal = own[row].masked_fill(matched, -1.0).max(dim=0)
        if overlap >= FOREGROUND:
            hit[row], matched[goal] = True, True
    return hit, matched


def _find_on_crowd(found: Detections, boxes: Tensor, labels: Tensor) -> Tensor:
    """(D,) whether at least half of a detection's area is inside a crowd of its class."""
    if not len(boxes):
        return torch.zeros(len(found.scores), dtype=torch.bool)
    low = torch.maximum(found.boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(found.boxes[:, None, 2:], boxes[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(dim=2)
    area = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(dim=1, keepdim=True)
    return ((inside >= FOREGROUND * area) & (found.labels[:, None] == labels)).any(dim=1)


def _mean_ap(
    scores: NDArray[np.float64], labels: NDArray[np.int64], hits: NDArray[np.bool_], objects: NDArray[np.int64]
) -> float:
    """Mean over the classes with objects of AP with 101 recalls, in 0-100; detections by falling score."""
    aps = []
    for label in np.flatnonzero(objects):
        own = hits[labels == label]
        found = np.cumsum(own)
        precision = found / np.arange(1, len(own) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(found / objects[label], _RECALLS, side="left")
        aps.append(float(best[at[at < len(best)]].sum()) / len(_RECALLS))
    return 100 * float(np.mean(aps)) if aps else 0.0
