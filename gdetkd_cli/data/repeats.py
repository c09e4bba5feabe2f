"""Finds images that two splits have in common."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import cache
from math import ceil
from pathlib import Path

from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.split import Split

_SAMPLE = 500  # images of a split whose content is compared; a copied set is found by a few of them
_MOST_OF_ONE_SIZE = 20  # training files of one length that are read; uncompressed images may all have the same


def find_repeated_images(train: Split, val: Split) -> list[Path]:
    """Returns files of ``val`` that ``train`` has, too: the same file or, in a sample, one of the same content."""
    if not isinstance(train.read, ImageFiles) or not isinstance(val.read, ImageFiles):
        return []
    own = {path: path.stat() for path in train.read.paths}
    files = {(stat.st_dev, stat.st_ino) for stat in own.values()}
    by_length: dict[int, list[Path]] = defaultdict(list)
    for path, stat in own.items():
        by_length[stat.st_size].append(path)
    every = ceil(len(val) / _SAMPLE)

    @cache
    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def is_repeated(index: int, path: Path) -> bool:
        stat = path.stat()
        alike = by_length[stat.st_size] if index % every == 0 else []
        return (stat.st_dev, stat.st_ino) in files or (
            0 < len(alike) <= _MOST_OF_ONE_SIZE and digest(path) in map(digest, alike)
        )

    return [path for index, path in enumerate(val.read.paths[: len(val)]) if is_repeated(index, path)]
