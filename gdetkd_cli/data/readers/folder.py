"""Reads a folder of images without annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.image_files import FORMATS, ImageFiles, read_sizes
from gdetkd_cli.data.split import Record, Split, is_in_part
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind, walk_files

_NUMBER = r"[0-9]+(\.[0-9]*)?(e-?[0-9]+)?"


def read_folder(folder: Path, which: Literal["train", "val", "all"] = "all", *, bad: BadImages | None = None) -> Split:
    """Reads the images in a folder and its subfolders, in the order of their paths, as a split without annotations.

    Args:
        which: every tenth image is ``val``, the others are ``train``.
        bad: collects the images that cannot be read; None: such an image is an error.

    Raises:
        DataError: the folder does not exist, or has too few images.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}{name_kind(folder)}; name a folder with images")
    every = sorted(find_images(folder))
    paths = [p for i, p in enumerate(every) if is_in_part(i, which)]
    if not paths:
        raise DataError(
            f"{folder} has {len(every)} images; expected at least 2, one of them for validation; add images"
        )
    found = zip(paths, read_sizes(paths, [None] * len(paths), bad, upright=True), strict=True)
    sizes = {path: size for path, size in found if size is not None}
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return Split(
        name=f"{folder.name}/{which}",
        class_names=(),
        records=[
            Record(number, size, *nothing, annotated=False) for number, size in enumerate(sizes.values(), start=1)
        ],
        read=ImageFiles(paths=list(sizes), sizes=list(sizes.values()), upright=True),
        bad=bad,
    )


def check_no_labels(folder: Path) -> None:
    """Checks that the images have no annotations in an unsupported format beside them, such as YOLO's.

    Raises:
        DataError: an image has a file of the same name with rows of YOLO or an annotation of VOC, or at least half of
            the images have a .txt, .xml or .json file of the same name.
    """
    images = {path.stem for path in find_images(folder)} if folder.is_dir() else set()
    files = [path for path in walk_files(folder) if path.suffix in (".txt", ".xml", ".json") and path.stem in images]
    if files and (2 * len({path.stem for path in files}) >= len(images) or any(map(_is_annotation, files))):
        raise DataError(
            f"{folder} has annotations in an unsupported format ({min(files).relative_to(folder)} and others); convert "
            "them to COCO's train.json and val.json, add YOLO's data.yaml with the class names or VOC's ImageSets, or "
            "name a folder with only images for the teacher to label"
        )


def _is_annotation(file: Path) -> bool:
    """Whether a file begins with a row of YOLO (a class and four or more numbers), or is an annotation of VOC."""
    try:
        with file.open(errors="replace") as text:
            start = text.read(4096)
    except OSError:
        return False
    if file.suffix == ".xml":
        return "<annotation" in start
    words = next(iter(start.splitlines()), "").split()
    numbers = len(words) >= 5 and words[0].isdecimal() and all(re.fullmatch(_NUMBER, word) for word in words)
    return file.suffix == ".txt" and numbers


def find_images(folder: Path) -> Iterator[Path]:
    """Finds the image files in a folder and its subfolders, by the endings of their names."""
    known = {ending for ending, format in Image.registered_extensions().items() if format in FORMATS}
    return (path for path in walk_files(folder) if path.suffix.lower() in known)
