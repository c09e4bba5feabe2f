"""Finds the annotations and images in a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gdetkd_cli.data.readers.bdd100k import read_first_frame
from gdetkd_cli.errors import DataError, get_first_line
from gdetkd_cli.files import name_kind, walk_files

_TRAIN = ("train", "trainset", "training", "trainval")  # the first match counts
_VAL = ("val", "valset", "valid", "validation", "test", "testset", "testing")
_MEANT = {"annotation", "annotations", "instances", "labels", "coco", "bbox", "boxes"}  # words of a file's name
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


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
    recognised by a word such as ``train``, ``val`` or ``test`` in the file's name, or else in its folder's:
    ``train.json``, ``annotations/instances_val2017.json``, ``valid/_annotations.coco.json``.

    Args:
        root: the folder.
        files: result of ``find_detection_files``; None to search.

    Raises:
        DataError: a split's annotations or images are missing.
    """
    if not root.is_dir():
        raise DataError(f"{root}{name_kind(root)} is not a folder; name a folder with COCO annotations and images")
    found = find_detection_files(root) if files is None else files
    train = _find_split_file(found, root, _TRAIN)
    val = _find_split_file((file for file in found if file != train), root, _VAL)
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
    return {file: name for file in _list_json(root) if (name := _read_first_image(file)) is not None}


def check_no_annotations(root: Path) -> None:
    """Checks that no JSON file is meant as annotations, where none could be read.

    Raises:
        DataError: a file is not JSON, has one of COCO's lists, or is named after a split.
    """
    for file in _list_json(root):
        if problem := _find_problem(file):
            raise DataError(
                f"{file} should be COCO detection JSON, but {problem}; correct the file, or name a folder with only "
                "images for the teacher to label"
            )


def _list_json(root: Path) -> list[Path]:
    files = (*root.glob("*.json"), *root.glob("*/*.json"))
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def _find_problem(file: Path) -> str | None:
    """Describes why a file that may be meant as annotations cannot be used; None for another tool's file."""
    words = {word.lower() for word in _WORD.findall(file.stem)}
    meant = words & _MEANT or words <= {*_TRAIN, *_VAL}  # named like annotations, or after a split alone
    try:
        tables = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read ({get_first_line(error)})" if meant else None
    has = {key: isinstance(tables, dict) and isinstance(tables.get(key), list) for key in ("images", "annotations")}
    if all(has.values()):
        return "its images have no file_name, or its annotations no bbox"
    if has["images"] and "annotations" not in tables:  # as COCO's list of unlabelled images
        return None
    missing = " and ".join(key for key, there in has.items() if not there)
    return f"it has no lists named {missing}" if meant or has["annotations"] else None


def find_bdd100k(root: Path) -> Layout | None:
    """Finds BDD100K's detection labels (``det_20`` or 2018) and images; None if there are none."""
    for pattern in ("det_{}.json", "bdd100k_labels_images_{}.json"):
        train, val = (next(iter(sorted(root.rglob(pattern.format(split)))), None) for split in ("train", "val"))
        if train and val:
            folders = (_find_image_folder(file, read_first_frame(file), root) for file in (train, val))
            return Layout(*(path.relative_to(root) for path in (train, val, *folders)))
    return None


def find_voc_lists(root: Path) -> tuple[list[Path], list[Path] | None] | None:
    """Finds Pascal VOC's lists of training and validation images, relative to the root; None if there are none.

    If a year has a list ``test``, that list is for validation and every year's ``trainval`` for training, as is usual.
    Otherwise each year's ``train`` and ``val`` are used. Without lists for validation there are those for training
    alone, among them ``default``, as CVAT writes it.
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
    if train and val:
        return train, val
    whole = [there[name] for there in lists for name in ("trainval", "train", "default") if name in there][:1]
    return (whole, None) if whole else None


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
    """Finds the file of a split, by the first of the words that a file has."""
    splits = {file: _name_split(file.relative_to(root)) for file in files}
    return next((file for word in words for file, split in splits.items() if split == word), None)


def _name_split(path: Path) -> str:
    """Returns the word that names a split, of the file's name if it has one, or else of the nearest folder's."""
    for part in reversed(path.parts):
        for word in _WORD.findall(part):
            if word.lower() in (*_TRAIN, *_VAL):
                return word.lower()
    return ""


def _find_image_folder(file: Path, name: str, root: Path) -> Path:
    """Finds the folder of a split's images: one that is called like the file or its split, or else the first one."""
    nested = dict.fromkeys(path.parent for path in walk_files(root) if path.name == Path(name).name)
    above = {parent for folder in nested for parent in folder.parents if parent.is_relative_to(root)}
    places = dict.fromkeys((file.parent, root / "images", root, *sorted(nested.keys() | above)))
    found = [folder for folder in places if os.path.isfile(folder / name)]
    if not found:
        raise DataError(f"{file} names the image {name}, which is nowhere in {root}; put the images there")
    called = [folder for folder in found if folder != root and folder.name in file.stem]
    split = _name_split(file.relative_to(root))
    alike = [folder for folder in found if split and _name_split(folder.relative_to(root)) == split]
    return next(iter([*called, *alike, *found]))
