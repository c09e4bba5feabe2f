"""Does an exported file find what the detector finds?

Shapes: D detections; boxes xyxy, pixels of the image as it was given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from gdetkd_cli.evaluation.predict import Predictor
from gdetkd_cli.structures import Detections

BOX_TOLERANCE = 0.05  # pixels
SCORE_TOLERANCE = 1e-3
_SAME_OBJECT_IOU = 0.5  # boxes of one class that overlap less are two objects, not one that moved
_SHADES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Parity:
    """An exported file against the eager detector.

    Attributes:
        images: images compared, of different sizes. empty: how many of them had no detection.
        detections: boxes compared in all.
        max_box_error: largest difference of a box coordinate, pixels.
        max_score_error: largest difference of a score.
        passed: within tolerance, same number of boxes and same labels on every image.
        unmatched: boxes without a counterpart of the same class on the other side.
    """

    images: int
    empty: int
    detections: int
    max_box_error: float
    max_score_error: float
    passed: bool
    unmatched: int = 0


@dataclass(frozen=True)
class Cut:
    """Which detections a detector leaves out.

    Attributes:
        score: it reports scores above this one.
        count: it reports this many per image at most, those of the highest scores.
    """

    score: float
    count: int

    @classmethod
    def of(cls, module: nn.Module) -> Cut:
        """That of a torchvision detector; of another one it is not known, so that nothing may be missing."""
        head: Any = getattr(module, "roi_heads", module)
        if not hasattr(head, "score_thresh"):
            return cls(score=-math.inf, count=sys.maxsize)
        return cls(score=head.score_thresh, count=head.detections_per_img)

    def of_image(self, found: Detections) -> float:
        """The score at which one image's detections were cut off."""
        return float(found.scores.min()) if len(found.scores) >= self.count else self.score


def check_parity(
    reference: Predictor,
    exported: Predictor,
    images: Sequence[Tensor],
    *,
    cut: Cut,
    box_tolerance: float = BOX_TOLERANCE,
    score_tolerance: float = SCORE_TOLERANCE,
) -> Parity:
    """Compares detections, image by image.

    Each box has to have a counterpart of its class on the other side, whatever its place in the order of scores. The
    exception are boxes whose score is within tolerance of the one where the detector cuts off: rounding decides
    whether those are reported, so they may be missing from one side.

    Args:
        reference: the detector.
        exported: the file made of it.
        images: images (3, H, W) in 0..1.
        cut: where the detector cuts off.
        box_tolerance: pixels that a box coordinate may differ by.
        score_tolerance: what a score may differ by.
    """
    empty, detections, unmatched, found = 0, 0, 0, 0
    box_errors, score_errors = [torch.zeros(1)], [torch.zeros(1)]
    for image in images:
        (expected,), (got,) = reference.predict([image]), exported.predict([image])
        rows, columns = _pairs(expected, got, box_tolerance)
        # Of near-equal scores at the cut each side may keep other boxes: what is paired there by overlap is no pair.
        moved = (expected.boxes[rows] - got.boxes[columns]).abs().amax(dim=1) > box_tolerance
        at_cut = (expected.scores[rows] - cut.of_image(got) <= score_tolerance) & (
            got.scores[columns] - cut.of_image(expected) <= score_tolerance
        )
        rows, columns = rows[~(moved & at_cut)], columns[~(moved & at_cut)]
        # How far a score without a counterpart is above the one where the other side cuts off.
        missing = _without(expected.scores, rows) - cut.of_image(got)
        surplus = _without(got.scores, columns) - cut.of_image(expected)
        empty += len(expected.scores) == 0
        detections += len(rows)
        found += len(expected.scores) + len(got.scores)
        unmatched += int((~(torch.cat([missing, surplus]) <= score_tolerance)).sum())  # NaN is not within tolerance
        box_errors.append((expected.boxes[rows] - got.boxes[columns]).abs().flatten())
        score_errors.append((expected.scores[rows] - got.scores[columns]).abs())
    box_error, score_error = float(torch.cat(box_errors).max()), float(torch.cat(score_errors).max())
    return Parity(
        images=len(images),
        empty=empty,
        detections=detections,
        max_box_error=box_error,
        max_score_error=score_error,
        # Where everything lies at the cut nothing was compared, and nothing is proved.
        passed=unmatched == 0
        and box_error <= box_tolerance
        and score_error <= score_tolerance
        and (detections > 0 or found == 0),
        unmatched=unmatched,
    )


def image_without_detections(detector: Predictor, size: tuple[int, int]) -> Tensor:
    """A image (3, height, width) in which the detector finds nothing.

    One of a single shade where the detector is silent on that; else one of NaN, from which no score passes a threshold.
    """
    for shade in _SHADES:
        image = torch.full((3, *size), shade)
        (found,) = detector.predict([image])
        if len(found.scores) == 0:
            return image
    return torch.full((3, *size), math.nan)


def _pairs(expected: Detections, got: Detections, box_tolerance: float) -> tuple[Tensor, Tensor]:
    """Rows of both sides that are the same detection: of one class, and near each other.

    Scores do not take part, for near-equal ones may swap places.
    """
    distance = (expected.boxes[:, None] - got.boxes[None]).abs().amax(dim=2)
    near = (box_iou(expected.boxes, got.boxes) >= _SAME_OBJECT_IOU) | (distance <= box_tolerance)
    distance = distance.where(near & (expected.labels[:, None] == got.labels[None]), torch.inf)
    rows, columns = [], []
    for row in range(len(expected.scores)):
        column = int(distance[row].argmin()) if len(got.scores) else -1
        if column >= 0 and torch.isfinite(distance[row, column]):
            rows.append(row)
            columns.append(column)
            distance[:, column] = torch.inf
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)


def _without(values: Tensor, rows: Tensor) -> Tensor:
    """The values of the other rows."""
    others = torch.ones(len(values), dtype=torch.bool)
    others[rows] = False
    return values[others]
