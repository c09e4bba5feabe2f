"""How much of a difference in AP is due to the choice of images: AP again on images drawn with replacement.

Detections are matched once, image by image, as pycocotools does it; drawing images again only counts matches
again. Shapes: P images, D detections of one class, T = 10 overlaps (0.50:0.95), B drawings.
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
_MOST = 100  # detections of one image and class that count


@dataclass(frozen=True)
class _Class:
    """One class, its detections by falling score.

    Attributes:
        image: (D,) which image each is of.
        hits: T times the places of those that are matched.
        ignored: (T, D) bool, neither a hit nor a miss since it matched a crowd; None where there is no such.
        objects: (P,) objects of each image that should be found.
    """

    image: NDArray[np.int64]
    hits: tuple[NDArray[np.int64], ...]
    ignored: NDArray[np.bool_] | None
    objects: NDArray[np.int64]


class MatchedImages:
    """The detections of a split, matched with the truth.

    Args:
        records: P images and their truth.
        class_names: K names, label k is ``class_names[k - 1]``.
        predictions: by image id; a image left out has no detections.

    Raises:
        DataError: as of ``evaluate_coco``.
    """

    def __init__(
        self, records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
    ) -> None:
        evaluation = match_images(records, class_names, predictions)
        order = {record.image_id: place for place, record in enumerate(records)}
        whole = evaluation.params.areaRng[0]
        found: dict[int, list[dict[str, NDArray[np.generic]]]] = {}
        for image in evaluation.evalImgs:
            if image is not None and image["aRng"] == whole:
                found.setdefault(image["category_id"], []).append(image)
        self.images = len(records)
        self._classes = [_gathered(images, order) for _, images in sorted(found.items())]

    def ap(self, times: NDArray[np.int64]) -> float:
        """AP in 0-100, each image counted so many ``times`` (P,); NaN where no object is left."""
        by_class = [ap for one in self._classes if (ap := _ap(one, times)) is not None]
        return 100 * float(np.mean(by_class)) if by_class else float("nan")

    def drawn(self, drawings: NDArray[np.int64]) -> NDArray[np.float64]:
        """AP on each drawing (B, P): (B,)."""
        return np.array([self.ap(times) for times in drawings])


def draw_again(images: int, *, drawings: int = 1000, seed: int = 0) -> NDArray[np.int64]:
    """How often each image is in each drawing of as many with replacement: (B, P), the same every time."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(images, size=(drawings, images))
    return np.stack([np.bincount(row, minlength=images) for row in drawn])


def deviation_of_difference(ours: Sequence[NDArray[np.float64]], theirs: Sequence[NDArray[np.float64]]) -> float:
    """The standard deviation, over drawings of the images, of the mean difference in AP between paired runs.

    Args:
        ours, theirs: by run, AP on each drawing (B,); the same drawings for all, the same seed at the same place.
    """
    differences = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    return float(np.nanstd(differences, ddof=1))  # NaN: a drawing in which no object is left


def _gathered(images: Sequence[Mapping[str, NDArray[np.generic]]], order: Mapping[int, int]) -> _Class:
    """pycocotools' findings of one class, put together."""
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


def _ap(one: _Class, times: NDArray[np.int64]) -> float | None:
    """AP of a class in 0..1; None where there is nothing to find."""
    wanted = int((one.objects * times).sum())
    if wanted == 0:
        return None
    if not len(one.image):
        return 0.0
    weight = times[one.image]
    ranks = np.cumsum(weight)  # how many detections there are up to each
    total = 0.0
    for overlap, places in enumerate(one.hits):
        # Precision matters at hits alone: between two of them it only falls.
        found = np.cumsum(weight[places])
        counted = ranks[places]
        if one.ignored is not None:
            counted = counted - np.cumsum(weight * one.ignored[overlap])[places]
        precision = found / np.maximum(counted, 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(found / wanted, _RECALLS, side="left")
        total += float(best[at[at < len(best)]].sum()) / len(_RECALLS)
    return total / len(one.hits)
