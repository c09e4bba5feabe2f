"""One split of a data set: records of what is in each image, and a way to read the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Outline = list[NDArray[np.float32]] | dict[str, Any] | None


@dataclass(frozen=True)
class Record:
    """One image and its truth. M boxes for training, G annotations for evaluation (crowds included).

    Attributes:
        image_id: the data set's own id.
        size: (height, width) pixels.
        boxes: (M, 4) float32 xyxy, pixels of the image, clipped to it, every side > 0, no crowds.
        labels: (M,) int64 in 1..K.
        truth: COCO-style annotations for evaluation: dictionaries with ``bbox`` (xywh, pixels), ``area``
            (square pixels), ``category_id`` (the label 1..K) and ``iscrowd``.
        outlines: of the M boxes' objects, where they were asked for: polygons (x, y, x, y, ...) in pixels, run lengths
            as COCO has them, or None for an object without; empty where they were not.
    """

    image_id: int
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    truth: list[dict[str, object]] = field(default_factory=list)
    outlines: tuple[Outline, ...] = ()


@dataclass(frozen=True)
class Split:
    """A split held in memory as records; images are read on demand.

    Attributes:
        name: for messages, for example ``bccd/train.json``.
        class_names: K names, label k is ``class_names[k - 1]``.
        records: one per image.
        read: record index -> (3, H, W) uint8 RGB.
        notes: what was found and changed on reading, for people ("3 boxes clipped to the image").
    """

    name: str
    class_names: tuple[str, ...]
    records: Sequence[Record]
    read: Callable[[int], Tensor]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)
