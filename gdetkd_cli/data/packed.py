"""Records, paths and sizes in a few arrays, so that a data set of millions of objects fits into memory once.

Loader processes are forks. Python objects would be copied into each of them, because reading an object changes its
count of references; arrays are shared.

Shapes: N images, M annotations.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdetkd_cli.data.split import Outline, Record


@dataclass(frozen=True)
class _Arrays:
    """The images, and their annotations one image after the other.

    Attributes:
        ids: (N,) int64.
        sizes: (N, 2) int64, (height, width) pixels.
        annotated: (N,) bool.
        first: (N + 1,) int64, index of the first annotation of each image.
        boxes: (M, 4) float64 xywh, pixels.
        areas: (M,) float64, square pixels.
        labels: (M,) int64.
        crowds: (M,) bool.
        outlines: of the M annotations; empty if they are not kept.
    """

    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    annotated: NDArray[np.bool_]
    first: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowds: NDArray[np.bool_]
    outlines: Sequence[Outline]


class PackedRecords(Sequence[Record]):
    """A sequence of records that are built when they are read."""

    def __init__(self, arrays: _Arrays, rows: NDArray[np.int64] | None = None) -> None:
        self._arrays = arrays
        self._rows = np.arange(len(arrays.ids)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> PackedRecords: ...

    def __getitem__(self, index: int | slice) -> Record | PackedRecords:
        if isinstance(index, slice):
            return PackedRecords(self._arrays, self._rows[index])
        return self._build(int(self._rows[index]))

    def __iter__(self) -> Iterator[Record]:
        return (self._build(int(row)) for row in self._rows)

    def select(self, indices: Sequence[int]) -> PackedRecords:
        """Returns some of the records."""
        return PackedRecords(self._arrays, self._rows[np.asarray(indices, dtype=np.int64)])

    def count_empty(self) -> int:
        """Returns the number of records without a training box."""
        arrays = self._arrays
        counts = np.cumsum(np.concatenate([[0], ~arrays.crowds]))
        return int((counts[arrays.first[self._rows + 1]] == counts[arrays.first[self._rows]]).sum())

    def relabel(self, table: Tensor) -> PackedRecords:
        """Returns the records with other labels; ``table[label]`` is the new one."""
        labels = table.numpy()[self._arrays.labels]
        return PackedRecords(replace(self._arrays, labels=labels), self._rows)

    def _build(self, row: int) -> Record:
        """Builds a record; its training boxes are the truth without crowds."""
        arrays = self._arrays
        part = slice(int(arrays.first[row]), int(arrays.first[row + 1]))
        height, width = arrays.sizes[row].tolist()
        crowds = arrays.crowds[part]
        boxes = torch.from_numpy(arrays.boxes[part][~crowds])
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy; indexing by an array copies
        values = (arrays.boxes[part], arrays.areas[part], arrays.labels[part], crowds)
        return Record(
            image_id=int(arrays.ids[row]),
            size=(height, width),
            boxes=boxes.to(torch.float32),
            labels=torch.from_numpy(arrays.labels[part][~crowds]),
            truth=[
                {"bbox": box, "area": area, "category_id": label, "iscrowd": int(crowd)}
                for box, area, label, crowd in zip(*(each.tolist() for each in values), strict=True)
            ],
            outlines=tuple(o for o, crowd in zip(arrays.outlines[part], crowds, strict=True) if not crowd)
            if arrays.outlines
            else (),
            annotated=bool(arrays.annotated[row]),
        )


class RecordPacker:
    """Collects annotations in any order."""

    def __init__(self, *, outlines: bool) -> None:
        self._keeps_outlines = outlines
        self._rows, self._labels, self._crowds = array("q"), array("q"), array("b")
        self._boxes, self._areas = array("d"), array("d")
        self._outlines: list[Outline] = []

    def add(self, row: int, item: dict[str, Any], outline: Outline) -> None:
        """Adds an annotation, in the form of ``Record.truth``, to the image with an index."""
        self._rows.append(row)
        self._boxes.extend(item["bbox"])
        self._areas.append(item["area"])
        self._labels.append(item["category_id"])
        self._crowds.append(item["iscrowd"])
        if self._keeps_outlines:
            self._outlines.append(outline)

    def build(self, ids: Sequence[int], sizes: Sequence[tuple[int, int]], annotated: Iterable[bool]) -> PackedRecords:
        """Builds the records of N images."""
        rows = np.asarray(self._rows, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        arrays = _Arrays(
            ids=np.asarray(ids, dtype=np.int64),
            sizes=np.asarray(sizes, dtype=np.int64).reshape(-1, 2),
            annotated=np.fromiter(annotated, dtype=np.bool_, count=len(ids)),
            first=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(ids)))]).astype(np.int64),
            boxes=np.asarray(self._boxes, dtype=np.float64).reshape(-1, 4)[order],
            areas=np.asarray(self._areas, dtype=np.float64)[order],
            labels=np.asarray(self._labels, dtype=np.int64)[order],
            crowds=np.asarray(self._crowds, dtype=np.bool_)[order],
            outlines=[self._outlines[index] for index in order.tolist()] if self._keeps_outlines else [],
        )
        return PackedRecords(arrays)


class PackedPaths(Sequence[Path]):
    """A sequence of paths below one folder.

    Args:
        names: of the files, relative to the folder.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._folder = folder
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return self._folder / os.fsdecode(self._text[self._ends[row] : self._ends[row + 1]].tobytes())


class PackedSizes(Sequence[tuple[int, int]]):
    """A sequence of (height, width) pixels."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return [(height, width) for height, width in self._sizes[index].tolist()]
        height, width = self._sizes[index].tolist()
        return height, width
