"""Where a folder keeps its annotations and images, found by looking."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gdetkd_cli.data.readers.bdd100k import first_frame
from gdetkd_cli.errors import DataError

_TRAIN = ("train",)
_VAL = ("val", "valid", "validation", "test")  # in this order


@dataclass(frozen=True)
class Layout:
    """Annotation files and image folders, all relative to the root that was searched."""

    train: Path
    val: Path
    train_images: Path
    val_images: Path


def find_layout(root: Path, files: Mapping[Path, str] | None = None) -> Layout:
    """Looks for two COCO detection files and the images that they name.

    Files are told apart by their own name or their folder's: ``train.json``, ``annotations/instances_val2017.json``,
    ``valid/_annotations.coco.json``.

    Args:
        root: the folder.
        files: its ``detection_files``, where they are known already.

    Raises:
        DataError: a split's annotations or images are not found, with what was looked at.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected one with COCO annotations and images")
    found = detection_files(root) if files is None else files
    train, val = (_of_split(found, root, words) for words in (_TRAIN, _VAL))
    if train is None or val is None:
        names = ", ".join(str(file.relative_to(root)) for file in found) or "no COCO detection file"
        missing = "training" if train is None else "validation"
        raise DataError(
            f"no annotations of a {missing} split in {root} (found: {names}); name them train.json and val.json, or "
            "write the recipe by hand: gdetkd recipe init"
        )
    folders = {split: _images_of(split, found[split], root) for split in (train, val)}
    return Layout(*(path.relative_to(root) for path in (train, val, folders[train], folders[val])))


def detection_files(root: Path) -> dict[Path, str]:
    """COCO detection files, with the file name of each one's first image."""
    files = sorted([*root.glob("*.json"), *root.glob("*/*.json")])
    return {file: name for file in files if (name := _first_image(file)) is not None}


def find_bdd100k(root: Path) -> Layout | None:
    """BDD100K's detection labels, of ``det_20`` or of 2018, and its images; None where the folder has none."""
    for pattern in ("det_{}.json", "bdd100k_labels_images_{}.json"):
        train, val = (next(iter(sorted(root.rglob(pattern.format(split)))), None) for split in ("train", "val"))
        if train and val:
            folders = (_images_of(file, first_frame(file), root) for file in (train, val))
            return Layout(*(path.relative_to(root) for path in (train, val, *folders)))
    return None


def find_voc_lists(root: Path) -> tuple[list[Path], list[Path]] | None:
    """Pascal VOC's lists of training and of validation images, relative to the root; None where it has none.

    Where a year has a list ``test``, validation is on it and training on every year's ``trainval``, as is the custom;
    else each year is divided by its own ``train`` and ``val``.
    """
    train: list[Path] = []
    val: list[Path] = []
    folders = sorted([*root.glob("ImageSets/Main"), *root.glob("*/ImageSets/Main")])
    lists = [{file.stem: file.relative_to(root) for file in folder.glob("*.txt")} for folder in folders]
    tests = any("test" in there for there in lists)
    for there in lists:
        wanted = ("trainval", "train") if tests else ("train",)
        train += [there[name] for name in wanted if name in there][:1]
        val += [there[name] for name in ("test" if tests else "val",) if name in there]
    return (train, val) if train and val else None


def _first_image(file: Path) -> str | None:
    """File name of a COCO detection file's first image; None where it is no such file."""
    try:
        tables = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(tables, dict) or not all(isinstance(tables.get(k), list) for k in ("images", "annotations")):
        return None
    boxes = [a for a in tables["annotations"][:1] if isinstance(a, dict) and "bbox" not in a]  # captions, key points
    first = next(iter(tables["images"]), None)
    return str(first["file_name"]) if not boxes and isinstance(first, dict) and "file_name" in first else None


def _of_split(files: Iterable[Path], root: Path, words: tuple[str, ...]) -> Path | None:
    for word in words:
        for file in files:
            if any(word in part.lower() for part in file.relative_to(root).parts):
                return file
    return None


def _images_of(file: Path, name: str, root: Path) -> Path:
    nested = (folder for folder in sorted(root.glob("**/*")) if folder.is_dir())
    for folder in (file.parent, root / "images", root, *nested):
        if (folder / name).is_file():
            return folder
    raise DataError(f"{file} names the image {name}, which is nowhere in {root}; put the images there")
