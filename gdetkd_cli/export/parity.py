"""Checks that an exported file gives the detector's detections.

Boxes are xyxy in pixels of the input image.
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
# For DETR-like detectors, whose boxes are fractions of the image. In float32, the boxes of a trained D-FINE differ from
# those in double precision by up to half of this.
QUERY_TOLERANCE = 1e-3  # of the image's long side
_SAME_OBJECT_IOU = 0.5  # boxes of one class with less overlap belong to two objects
_SHADES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Parity:
    """Result of comparing an exported file with the eager detector.

    Attributes:
        empty: images without a detection.
        detections: compared boxes of all images.
        max_box_error: largest difference of a box coordinate, pixels.
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
    """The limits of a detector's output.

    Attributes:
        score: only detections with a higher score are reported.
        count: at most this many per image are reported, those with the highest scores.
    """

    score: float
    count: int

    @classmethod
    def of(cls, module: nn.Module) -> Cut:
        """The limits of a torchvision detector; none for another one, so that nothing may be missing."""
        head: Any = getattr(module, "roi_heads", module)
        if not hasattr(head, "score_thresh"):
            return cls(score=-math.inf, count=sys.maxsize)
        return cls(score=head.score_thresh, count=head.detections_per_img)

    def find_limit(self, detections: Detections) -> float:
        """The score below which one image's detections were cut off."""
        scores = detections.scores
        return float(scores.min()) if len(scores) >= self.count else self.score


def check_parity(
    reference: Predictor,
    exported: Predictor,
    images: Sequence[Tensor],
    *,
    cut: Cut,
    relative: float = 0.0,
    together: bool = False,
) -> Parity:
    """Compares detections, image by image.

    Each box needs a counterpart of its class on the other side, at any rank. Boxes with a score within tolerance of the
    cut may be missing on one side, because rounding decides whether they are reported.

    Args:
        images: images (3, H, W) in 0..1.
        relative: allowed difference of a box coordinate as a fraction of the image's long side, if that is more than
            ``BOX_TOLERANCE``.
        together: give the file all images at once, because it is batched; else one at a time.
    """
    near = True
    empty, detections, unmatched, found = 0, 0, 0, 0
    box_errors, score_errors = [torch.zeros(1)], [torch.zeros(1)]
    found_by_file = exported.predict(list(images)) if together else [exported.predict([one])[0] for one in images]
    for image, got in zip(images, found_by_file, strict=True):
        (expected,) = reference.predict([image])
        rows, columns = _pair_detections(expected, got)
        allowed = max(BOX_TOLERANCE, relative * max(image.shape[-2:]))
        # At the cut each side may keep other boxes of near-equal scores, so overlap there does not make a pair.
        moved = (expected.boxes[rows] - got.boxes[columns]).abs().amax(dim=1) > allowed
        at_cut = (expected.scores[rows] - cut.find_limit(got) <= SCORE_TOLERANCE) & (
            got.scores[columns] - cut.find_limit(expected) <= SCORE_TOLERANCE
        )
        rows, columns = rows[~(moved & at_cut)], columns[~(moved & at_cut)]
        # How far a score without a counterpart is above the other side's cut.
        missing = _drop_rows(expected.scores, rows) - cut.find_limit(got)
        surplus = _drop_rows(got.scores, columns) - cut.find_limit(expected)
        empty += len(expected.scores) == 0
        detections += len(rows)
        found += len(expected.scores) + len(got.scores)
        unmatched += int((~(torch.cat([missing, surplus]) <= SCORE_TOLERANCE)).sum())  # NaN is not within tolerance
        box_errors.append((expected.boxes[rows] - got.boxes[columns]).abs().flatten())
        near = near and bool((box_errors[-1] <= allowed).all())
        score_errors.append((expected.scores[rows] - got.scores[columns]).abs())
    box_error, score_error = float(torch.cat(box_errors).max()), float(torch.cat(score_errors).max())
    return Parity(
        images=len(images),
        empty=empty,
        detections=detections,
        max_box_error=box_error,
        max_score_error=score_error,
        # If all detections lie at the cut, nothing was compared.
        passed=unmatched == 0 and near and score_error <= SCORE_TOLERANCE and (detections > 0 or found == 0),
        unmatched=unmatched,
    )


def build_empty_image(detector: Predictor, size: tuple[int, int]) -> Tensor:
    """An image (3, height, width) without detections.

    It has a single shade without detections, else NaN, since no NaN score passes a threshold.
    """
    for shade in _SHADES:
        image = torch.full((3, *size), shade)
        (detections,) = detector.predict([image])
        if len(detections.scores) == 0:
            return image
    return torch.full((3, *size), math.nan)


def _pair_detections(expected: Detections, got: Detections) -> tuple[Tensor, Tensor]:
    """Rows of both sides with the same detection: of one class, and near each other.

    Scores are not used, since near-equal ones may swap ranks.
    """
    distance = (expected.boxes[:, None] - got.boxes[None]).abs().amax(dim=2)
    near = (box_iou(expected.boxes, got.boxes) >= _SAME_OBJECT_IOU) | (distance <= BOX_TOLERANCE)
    distance = distance.where(near & (expected.labels[:, None] == got.labels[None]), torch.inf)
    rows, columns = [], []
    for row in range(len(expected.scores)):
        column = int(distance[row].argmin()) if len(got.scores) else -1
        if column >= 0 and torch.isfinite(distance[row, column]):
            rows.append(row)
            columns.append(column)
            distance[:, column] = torch.inf
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)


def _drop_rows(values: Tensor, rows: Tensor) -> Tensor:
    """The values outside ``rows``."""
    others = torch.ones(len(values), dtype=torch.bool)
    others[rows] = False
    return values[others]
