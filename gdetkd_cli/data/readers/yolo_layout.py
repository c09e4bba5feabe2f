"""Finds class names and images in YOLO's folders, as Ultralytics, Roboflow, CVAT and Label Studio write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from gdetkd_cli.data.readers.data_yaml import YoloConfig, read_yolo_config
from gdetkd_cli.data.readers.folder import find_images
from gdetkd_cli.data.readers.yolo import find_labels
from gdetkd_cli.errors import DataError

_WORDS = {"train": ("train",), "val": ("val", "valid", "validation", "test")}  # the first match counts
_YAMLS = ("data.yaml", "data.yml", "dataset.yaml")
_LISTS = ("obj.names", "data/obj.names", "classes.txt", "labels/classes.txt", "images/classes.txt")
_SAMPLE = 50  # images whose label files are looked for

Sources = list[Path] | Literal["auto"]


@dataclass(frozen=True)
class YoloLayout:
    """The fields of a recipe's ``data`` block; paths are relative to the searched folder.

    ``auto`` stands for what ``data.yaml`` names. ``val`` is None if there is no validation split.
    """

    names: Path
    train: Sources
    val: Sources | None


def find_yolo(root: Path) -> YoloLayout | None:
    """Finds the file of class names and the images of both splits; None if the folder is not in YOLO's format.

    Splits that ``data.yaml`` does not name, or names in folders that do not exist, are found by their usual folders.

    Raises:
        DataError: ``data.yaml`` is not valid.
    """
    config = _find_config(root)
    if config is None:
        return None
    stated: dict[str, Sources | None] = {}
    for which in ("train", "val"):
        stated[which] = "auto" if _has_sources(config, which) else _find_sources(root, _WORDS[which])
    train = stated["train"]
    if train is None:
        folder = Path("images") if (root / "images").is_dir() else Path()
        train = [folder]
        stated["val"] = None
    return YoloLayout(config.file.relative_to(root), train, stated["val"])


def _find_config(root: Path) -> YoloConfig | None:
    for name in _YAMLS:
        if (root / name).is_file():
            return read_yolo_config(root / name)
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            return read_yolo_config(file)
        except DataError:  # another tool's file
            continue
    for name in _LISTS:
        if (root / name).is_file() and any(map(find_labels, islice(find_images(root), _SAMPLE))):
            return read_yolo_config(root / name)
    return None


def _has_sources(config: YoloConfig, which: Literal["train", "val"]) -> bool:
    try:
        return bool(config.find_sources(which))
    except DataError:
        return False


def _find_sources(root: Path, words: Sequence[str]) -> Sources | None:
    return next(([path.relative_to(root)] for word in words for path in _list_candidates(root, word)), None)


def _list_candidates(root: Path, word: str) -> Iterator[Path]:
    """Yields ``train/images``, ``images/train``, ``images/train2017``, ``train.txt``, ``data/train.txt``, ``train``."""
    folders = [root / word / "images", *sorted((root / "images").glob(f"{word}*"))]
    yield from (folder for folder in folders if folder.is_dir())
    yield from (file for file in (root / f"{word}.txt", root / "data" / f"{word}.txt") if file.is_file())
    if any(find_images(root / word)):
        yield root / word
