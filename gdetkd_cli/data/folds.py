"""Divides images: every tenth for validation, or the pooled images of both splits into folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.packed import PackedRecords
from gdetkd_cli.data.readers.coco import align_classes
from gdetkd_cli.data.split import Split, is_in_part
from gdetkd_cli.errors import DataError

_SHUFFLE = 0  # one order for all runs, independent of their seeds


@dataclass(frozen=True)
class _PooledReader:
    """Reads images of several splits; a class, not a closure, because loader processes pickle it.

    Attributes:
        reads: ``Split.read`` of each split.
        places: for each image, (split, index in the split).
    """

    reads: Sequence[Callable[[int], Tensor]]
    places: Sequence[tuple[int, int]]

    def __call__(self, index: int) -> Tensor:
        split, place = self.places[index]
        return self.reads[split](place)


def hold_out(split: Split, which: Literal["train", "val"]) -> Split:
    """Returns every tenth image of a split (``val``) or all others (``train``).

    Raises:
        DataError: there are too few images.
    """
    chosen = [index for index in range(len(split)) if is_in_part(index, which)]
    if not chosen:
        raise DataError(
            f"{split.name} has {len(split)} images; expected at least 2, one of them for validation; add images"
        )
    part = "every tenth image" if which == "val" else "without every tenth image"
    return replace(select_images(split, chosen), name=f"{split.name}, {part}")


def select_images(split: Split, indices: Sequence[int]) -> Split:
    """Returns a split with some of its images."""
    own, read = split.records, split.read
    records = own.select(indices) if isinstance(own, PackedRecords) else [own[index] for index in indices]
    if not isinstance(read, ImageFiles):
        return replace(split, records=records, read=lambda place: read(indices[place]))
    paths, sizes = read.paths, read.sizes
    files = replace(read, paths=[paths[index] for index in indices], sizes=[sizes[index] for index in indices])
    return replace(split, records=records, read=files)


def build_fold(train: Split, val: Split, *, number: int, of: int, which: Literal["train", "val", "all"]) -> Split:
    """Builds one fold of two pooled splits.

    Image ids are new: 1 to the number of images in both splits, the same in every fold, so that detections of several
    folds can be pooled. Within a fold, images keep the order of the splits.

    Args:
        train, val: the splits; labels refer to ``train``'s class list.
        number: the fold that is held out, 1 to ``of``.
        of: number of folds; their sizes differ by at most one image.
        which: ``val`` is the fold, ``train`` all other images, ``all`` every image.

    Raises:
        DataError: there are fewer images than folds, a class of ``val`` is not in ``train``, or an image occurs twice.
    """
    parts = (train, align_classes(val, train.class_names))
    _check_distinct(parts)
    places = [(part, index) for part, split in enumerate(parts) for index in range(len(split))]
    if of > len(places):
        raise DataError(f"{len(places)} images cannot be divided into {of} folds; choose {len(places)} folds or fewer")
    # RandomState, not default_rng: NumPy guarantees its numbers across versions.
    order = np.random.RandomState(_SHUFFLE).permutation(len(places)).tolist()
    held_out = set(order[number - 1 :: of])
    chosen = [i for i in range(len(places)) if which == "all" or (i in held_out) == (which == "val")]
    records = [replace(parts[places[i][0]].records[places[i][1]], image_id=i + 1) for i in chosen]
    part = "all folds" if which == "all" else f"{'held out' if which == 'val' else 'all but'} fold {number} of {of}"
    return Split(
        name=f"{train.name} and {val.name}, {part}",
        class_names=train.class_names,
        records=records,
        read=_pool_readers([split.read for split in parts], [places[i] for i in chosen]),
        notes=tuple(f"{split.name}: {note}" for split in parts for note in split.notes),
        bad=train.bad,
    )


def _pool_readers(
    reads: Sequence[Callable[[int], Tensor]], places: Sequence[tuple[int, int]]
) -> ImageFiles | _PooledReader:
    """Returns a reader of the images at these places; if possible one of files, whose headers can be checked."""
    files = [read for read in reads if isinstance(read, ImageFiles)]
    if len(files) < len(reads) or len({read.upright for read in files}) > 1:
        return _PooledReader(reads, places)
    paths = [files[split].paths[index] for split, index in places]
    sizes = [files[split].sizes[index] for split, index in places]
    return replace(files[0], paths=paths, sizes=sizes)


def _check_distinct(parts: Sequence[Split]) -> None:
    """Raises a DataError if an image file occurs twice, because a fold could then train on a test image."""
    times = Counter(
        path.absolute() for split in parts if isinstance(split.read, ImageFiles) for path in split.read.paths
    )
    repeated = [path for path, count in times.items() if count > 1]
    if repeated:
        names = " and ".join(dict.fromkeys(split.name for split in parts))
        raise DataError(
            f"{names} name {len(repeated)} images more than once, {repeated[0]} first; folds need each image once; "
            "remove the repeated entries"
        )
