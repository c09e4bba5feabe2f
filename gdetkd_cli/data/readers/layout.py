"""Finds the annotations and images in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gdetkd_cli.data.readers.bdd100k import read_first_frame
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind

_TRAIN = ("train",)
_VAL = ("val", "valid", "validation", "test")  # the first match counts


@dataclass(frozen=True)
class Layout:
    """Annotation files and image folders, relative to the searched folder; None: there is no validation split."""

    train: Path
    val: Path | None
    train_images: Path
    val_images: Path | None


def find_layout(root: Path, files: Mapping[Path, str] | None = None) -> Layout:
    """Finds COCO detection files and the folders of their images.

    A single file that is not named after the validation split is the training split. Otherwise the split is
    recognised by the name of the file or its folder: ``train.json``,
    ``annotations/instances_val2017.json``, ``valid/_annotations.coco.json``.

    Args:
        root: the folder.
        files: result of ``find_detection_files``; None to search.

    Raises:
        DataError: a split's annotations or images are missing.
    """
    if not root.is_dir():
        raise DataError(f"{root}{name_kind(root)} is not a folder; name a folder with COCO annotations and images")
    found = find_detection_files(root) if files is None else files
    train, val = (_find_split_file(found, root, words) for words in (_TRAIN, _VAL))
    if len(found) == 1 and val is None:
        train = next(iter(found))
    elif train is None or val is None:
        names = ", ".join(str(file.relative_to(root)) for file in found) or "no COCO detection file"
        missing = "training" if train is None else "validation"
        raise DataError(
            f"no annotations of a {missing} split in {root} (found: {names}); name them train.json and val.json, or "
            "write the recipe by hand: gdetkd recipe init"
        )
    assert train is not None
    images = _find_image_folder(train, found[train], root).relative_to(root)
    if val is None:
        return Layout(train.relative_to(root), None, images, None)
    val_images = _find_image_folder(val, found[val], root).relative_to(root)
    return Layout(train.relative_to(root), val.relative_to(root), images, val_images)


def find_detection_files(root: Path) -> dict[Path, str]:
    """Finds COCO detection files; returns the file name of each one's first image."""
    files = sorted(file for file in (*root.glob("*.json"), *root.glob("*/*.json")) if file.is_file())
    return {file: name for file in files if (name := _read_first_image(file)) is not None}


def find_bdd100k(root: Path) -> Layout | None:
    """Finds BDD100K's detection labels (``det_20`` or 2018) and images; None if there are none."""
    for pattern in ("det_{}.json", "bdd100k_labels_images_{}.json"):
        train, val = (next(iter(sorted(root.rglob(pattern.format(split)))), None) for split in ("train", "val"))
        if train and val:
            folders = (_find_image_folder(file, read_first_frame(file), root) for file in (train, val))
            return Layout(*(path.relative_to(root) for path in (train, val, *folders)))
    return None


def find_voc_lists(root: Path) -> tuple[list[Path], list[Path]] | None:
    """Finds Pascal VOC's lists of training and validation images, relative to the root; None if there are none.

    If a year has a list ``test``, that list is for validation and every year's ``trainval`` for training, as is usual.
    Otherwise each year's ``train`` and ``val`` are used.
    """
    train: list[Path] = []
    val: list[Path] = []
    folders = sorted([*root.glob("ImageSets/Main"), *root.glob("*/ImageSets/Main")])
    lists = [{file.stem: file.relative_to(root) for file in folder.glob("*.txt")} for folder in folders]
    tests = any("test" in there for there in lists)
    for there in lists:
        names = ("trainval", "train") if tests else ("train",)
        train += [there[name] for name in names if name in there][:1]
        val += [there[name] for name in ("test" if tests else "val",) if name in there]
    return (train, val) if train and val else None


def _read_first_image(file: Path) -> str | None:
    """Reads the file name of a COCO detection file's first image; None for other files."""
    try:
        tables = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(tables, dict) or not all(isinstance(tables.get(k), list) for k in ("images", "annotations")):
        return None
    boxes = [a for a in tables["annotations"][:1] if isinstance(a, dict) and "bbox" not in a]  # captions, key points
    first = next(iter(tables["images"]), None)
    return str(first["file_name"]) if not boxes and isinstance(first, dict) and "file_name" in first else None


def _find_split_file(files: Iterable[Path], root: Path, words: tuple[str, ...]) -> Path | None:
    for word in words:
        for file in files:
            if any(word in part.lower() for part in file.relative_to(root).parts):
                return file
    return None


def _find_image_folder(file: Path, name: str, root: Path) -> Path:
    nested = (folder for folder in sorted(root.glob("**/*")) if folder.is_dir())
    for folder in (file.parent, root / "images", root, *nested):
        if os.path.isfile(folder / name):
            return folder
    raise DataError(f"{file} names the image {name}, which is nowhere in {root}; put the images there")
