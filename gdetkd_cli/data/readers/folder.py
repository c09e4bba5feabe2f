"""A folder of images without annotations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from gdetkd_cli.data.image_files import ImageFiles, read_image_size
from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.errors import DataError

_HELD_OUT = 10  # one image in so many is for validation


def read_folder(folder: Path, which: Literal["train", "val", "all"] = "all") -> Split:
    """The images in a folder and the folders in it, in the order of their paths; nothing is known of what they show.

    Args:
        folder: to search.
        which: every tenth image is ``val``, the others are ``train``.

    Raises:
        DataError: there is no such folder, or too few images are in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; name one with images in it")
    every = sorted(_images(folder))
    paths = [p for i, p in enumerate(every) if which == "all" or (i % _HELD_OUT == 0) == (which == "val")]
    if not paths:
        raise DataError(f"{folder} has {len(every)} images; at least 2 were expected, one of them to validate with")
    sizes = [read_image_size(path) for path in paths]
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return Split(
        name=f"{folder.name}/{which}",
        class_names=(),
        records=[Record(number, size, *nothing) for number, size in enumerate(sizes, start=1)],
        read=ImageFiles(paths=paths, sizes=sizes),
    )


def check_no_labels(folder: Path) -> None:
    """That the images have no annotations beside them in a format that is not read here, as YOLO's.

    Raises:
        DataError: every second image or more has a file of its name.
    """
    images = {path.stem for path in _images(folder)} if folder.is_dir() else set()
    files = [path for path in folder.rglob("*") if path.suffix in (".txt", ".xml", ".json") and path.stem in images]
    if images and 2 * len({path.stem for path in files}) >= len(images):
        raise DataError(
            f"{folder} has annotations of a format that is not read ({min(files).relative_to(folder)} and others); "
            "convert them to COCO's train.json and val.json, or name a folder with the images alone, which the "
            "teacher will label"
        )


def _images(folder: Path) -> Iterator[Path]:
    endings = Image.registered_extensions()  # some are of formats that Pillow writes only
    known = {ending for ending, format in endings.items() if format in Image.OPEN}
    return (path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
