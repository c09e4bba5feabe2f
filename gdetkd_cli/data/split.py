"""A split of a data set: a record of each image, and a function that reads the image.

Shapes: M boxes, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gdetkd_cli.data.bad_images import BadImageError, BadImages
from gdetkd_cli.errors import DataError

_HELD_OUT = 10  # every tenth image is for validation if the data have no validation split

Outline = list[NDArray[np.float32]] | dict[str, Any] | None


@dataclass(frozen=True)
class DataProblem:
    """An annotation or image that a reader changed or left out.

    ``place`` names the file and the line or entry in it.
    """

    place: str
    problem: str


@dataclass(frozen=True)
class Record:
    """One image and its annotations.

    Attributes:
        image_id: its id in the data set.
        size: (height, width) pixels.
        boxes: (M, 4) float32 xyxy for training: pixels, clipped to the image, every side > 0, no crowds.
        labels: (M,) int64 in 1..K.
        truth: COCO-style annotations for evaluation, with crowds: dictionaries with ``bbox`` (xywh, pixels), ``area``
            (square pixels), ``category_id`` (the label 1..K) and ``iscrowd``.
        outlines: of the M objects: polygons (x, y, x, y, ...) in pixels, COCO's run lengths, or None for an object
            without one; empty if the reader did not keep them.
        annotated: whether someone annotated the image, even as an image without objects.
    """

    image_id: int
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    truth: list[dict[str, object]] = field(default_factory=list)
    outlines: tuple[Outline, ...] = ()
    annotated: bool = True


@dataclass(frozen=True)
class Split:
    """A split as records in memory; images are read on demand.

    Attributes:
        name: for messages, for example ``bccd/train.json``.
        class_names: K names; label k is ``class_names[k - 1]``.
        records: one per image.
        read: record index -> (3, H, W) uint8 RGB.
        bad: collects the images that cannot be read, which are left out; None: such an image is an error.
        notes: remarks and changes of the reader, shown to the user ("3 boxes clipped to the image").
    """

    name: str
    class_names: tuple[str, ...]
    records: Sequence[Record]
    read: Callable[[int], Tensor]
    notes: tuple[str, ...] = ()
    bad: BadImages | None = None

    def __len__(self) -> int:
        return len(self.records)

    def read_if_whole(self, index: int) -> Tensor | None:
        """Reads an image, (3, H, W) uint8; None if it cannot be read and such images are left out."""
        try:
            return self.read(index)
        except BadImageError as error:
            if self.bad is None:
                raise
            self.bad.add(error)
            return None

    def read_first(self, start: int = 0) -> Tensor:
        """Reads the first image from ``start`` on that can be read, (3, H, W) uint8.

        Raises:
            DataError: there is none, or an image cannot be read and such images are errors.
        """
        for place in range(len(self)):
            image = self.read_if_whole((start + place) % len(self))
            if image is not None:
                return image
        raise DataError(f"no image of {self.name} can be read; give other data")


def is_in_part(index: int, which: Literal["train", "val", "all"]) -> bool:
    """Whether the image with an index is in a part of data without a validation split: every tenth is in ``val``."""
    return which == "all" or (index % _HELD_OUT == 0) == (which == "val")
