"""Measures how much of a difference in AP is due to the choice of images, with AP on images drawn with replacement.

Detections are matched once per image, as in pycocotools; each drawing only counts the matches again.
Shapes: N images, P detections of one class, T = 10 overlaps (0.50:0.95), B drawings, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gdetkd_cli.data.split import Record
from gdetkd_cli.evaluation.coco_metrics import match_images
from gdetkd_cli.structures import Detections

_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST = 100  # detections per image and class


@dataclass(frozen=True)
class _Class:
    """One class, with its detections by descending score.

    Attributes:
        image: (P,) image of each detection.
        hits: by overlap (T), the indices of the matched detections.
        ignored: (T, P) bool, neither a hit nor a miss since it matched a crowd; None if there are none.
        objects: (N,) objects of each image, without crowds.
    """

    image: NDArray[np.int64]
    hits: tuple[NDArray[np.int64], ...]
    ignored: NDArray[np.bool_] | None
    objects: NDArray[np.int64]


class MatchedImages:
    """The detections of a split, matched with the truth.

    Args:
        records: N images and their truth.
        class_names: K names; label k is ``class_names[k - 1]``.
        predictions: by image id; a missing image has no detections.

    Raises:
        DataError: see ``evaluate_coco``.
    """

    def __init__(
        self, records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
    ) -> None:
        evaluation = match_images(records, class_names, predictions)
        order = {record.image_id: place for place, record in enumerate(records)}
        whole = evaluation.params.areaRng[0]
        by_class: dict[int, list[dict[str, NDArray[np.generic]]]] = {}
        for image in evaluation.evalImgs:
            if image is not None and image["aRng"] == whole:
                by_class.setdefault(image["category_id"], []).append(image)
        self.images = len(records)
        self._classes = [_gather_class(images, order) for _, images in sorted(by_class.items())]

    def ap(self, times: NDArray[np.int64]) -> float:
        """AP in 0-100, with each image counted ``times`` (N,) times; NaN if no object is left."""
        aps = [ap for matches in self._classes if (ap := _compute_ap(matches, times)) is not None]
        return 100 * float(np.mean(aps)) if aps else float("nan")

    def compute_aps(self, drawings: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B,) AP on each drawing (B, N)."""
        return np.array([self.ap(times) for times in drawings])


def draw_again(images: int, *, drawings: int = 1000) -> NDArray[np.int64]:
    """(B, N) how often each image is in each drawing of N images with replacement; the same at every call."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(images, size=(drawings, images))
    return np.stack([np.bincount(row, minlength=images) for row in drawn])


def deviation_of_difference(ours: Sequence[NDArray[np.float64]], theirs: Sequence[NDArray[np.float64]]) -> float:
    """The standard deviation, over drawings of the images, of the mean difference in AP between paired runs.

    Args:
        ours, theirs: by run, AP on each drawing (B,); runs are paired by seed and share the drawings.
    """
    differences = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    return float(np.nanstd(differences, ddof=1))  # a drawing without objects gives NaN


def _gather_class(images: Sequence[Mapping[str, NDArray[np.generic]]], order: Mapping[int, int]) -> _Class:
    """Joins pycocotools' matches of one class."""
    objects = np.zeros(len(order), dtype=np.int64)
    places_of, scores, hits, ignored = [], [], [], []
    for image in images:
        place = order[int(image["image_id"])]
        objects[place] = int((np.asarray(image["gtIgnore"]) == 0).sum())
        own = np.asarray(image["dtScores"], dtype=float)[:_MOST]
        scores.append(own)
        places_of.append(np.full(len(own), place, dtype=np.int64))
        hits.append(np.asarray(image["dtMatches"])[:, :_MOST] != 0)
        ignored.append(np.asarray(image["dtIgnore"], dtype=bool)[:, :_MOST])
    ranks = np.argsort(-np.concatenate(scores), kind="mergesort")
    hit, ignore = np.concatenate(hits, axis=1)[:, ranks], np.concatenate(ignored, axis=1)[:, ranks]
    places = tuple(np.flatnonzero(row) for row in hit & ~ignore)
    return _Class(np.concatenate(places_of)[ranks], places, ignore if ignore.any() else None, objects)


def _compute_ap(matches: _Class, times: NDArray[np.int64]) -> float | None:
    """AP of a class in 0..1; None if it has no objects."""
    objects = int((matches.objects * times).sum())
    if objects == 0:
        return None
    if not len(matches.image):
        return 0.0
    weight = times[matches.image]
    ranks = np.cumsum(weight)  # detections up to and including each
    total = 0.0
    for overlap, places in enumerate(matches.hits):
        # Precision matters only at hits, since it falls between two of them.
        hits = np.cumsum(weight[places])
        counted = ranks[places]
        if matches.ignored is not None:
            counted = counted - np.cumsum(weight * matches.ignored[overlap])[places]
        precision = hits / np.maximum(counted, 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(hits / objects, _RECALLS, side="left")
        total += float(best[at[at < len(best)]].sum()) / len(_RECALLS)
    return total / len(matches.hits)
