"""Reads YOLO's labels: one text file per image, with a class number and a box or a polygon per row."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.image_files import read_sizes
from gdetkd_cli.data.readers.coco import Tables, build_split_from_tables, mark_upright
from gdetkd_cli.data.readers.data_yaml import YoloConfig, list_images
from gdetkd_cli.data.readers.folder import find_images
from gdetkd_cli.data.readers.tally import Remark, Tally
from gdetkd_cli.data.split import DataProblem, Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind
from gdetkd_cli.text import show_hidden

_OVER = 0.01  # a coordinate this far outside 0..1 is no rounding error, but a pixel or a slip

_NO_FILE = Remark("{n} image{s} without a label file, read as images without objects.")
_BAD_ROW = Remark(
    "{n} row{s} dropped: not a class number with 4 numbers (a box) or with 6, 8, ... (a polygon).",
    drops=True,
    names_place=True,
)
_NOT_NORMALISED = Remark(
    "{n} row{s} dropped: a coordinate is not between 0 and 1, as a fraction of the image's side.",
    drops=True,
    names_place=True,
)
_NO_CLASS = Remark("{n} row{s} dropped: the class number has no name.", drops=True, names_place=True)


def read_yolo(
    *,
    config: YoloConfig,
    sources: Sequence[Path],
    root: Path,
    classes: Sequence[str] | None = None,
    needs_labels: bool = True,
    outlines: bool = False,
    bad: BadImages | None = None,
    problems: list[DataProblem] | None = None,
) -> Split:
    """Reads the images in folders and lists. Their sizes are read from the image files.

    The labels of ``images/a.jpg`` are ``labels/a.txt``; without a folder ``images`` they are beside the image. An image
    whose label file is empty or missing has no objects. A polygon becomes its enclosing box.

    Args:
        sources: folders, searched with their subfolders, or ``.txt`` lists of images.
        root: folder from which the names in lists may start.
        classes: names to use, in this order; default: all.
        needs_labels: whether it is an error if no image has a label file.
        outlines: whether to keep polygons as outlines.
        bad, problems: as in ``read_coco``.

    Raises:
        DataError: there are no images, none has a label file, or ``classes`` does not fit the names.
    """
    paths = list(dict.fromkeys(path for source in sources for path in _list_source(source, root, config.file)))
    if not paths:
        raise DataError(f"there are no images in {sources[0]}; name a folder with images, or a list of them")
    labels = [find_labels(path) for path in paths]
    if needs_labels and not any(labels):
        raise DataError(
            f"none of the {len(paths)} images in {sources[0]} has a label file; expected for the first one "
            f"{_list_label_files(paths[0])[0]}; add the labels, or use `format: folder` for images without any"
        )
    tally = Tally(problems)
    places: list[tuple[Path, int]] = []
    sizes = read_sizes(paths, [None] * len(paths), bad, upright=True)
    return build_split_from_tables(
        mark_upright(_build_tables(zip(paths, sizes, labels, strict=True), config, tally, places)),
        source=sources[0],
        images=Path(),
        classes=classes,
        outlines=outlines,
        bad=bad,
        tally=tally,
        describe_place=lambda index: _describe_line(*places[index]),
        annotated={number for number, file in enumerate(labels, start=1) if file is not None},
    )


def _build_tables(
    images: Iterable[tuple[Path, tuple[int, int] | None, Path | None]],
    config: YoloConfig,
    tally: Tally,
    places: list[tuple[Path, int]],
) -> Tables:
    """Builds COCO's tables.

    Args:
        images: file, (height, width) pixels and label file of each image; an image without a size is left out.
        tally: receives the remarks about rows that are left out.
        places: receives label file and line of each annotation.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, size, file) in enumerate(images, start=1):
        if size is None:
            continue
        entries.append({"id": number, "file_name": str(path), "height": size[0], "width": size[1]})
        if file is None:
            tally.add(_NO_FILE)
            continue
        for line, row in _read_rows(file, config, tally):
            annotations.append({"image_id": number, **_convert_row(row, size)})
            places.append((file, line))
    categories = [{"id": number, "name": name} for number, name in config.names.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def find_labels(image: Path) -> Path | None:
    """Finds the label file of an image; None if there is none."""
    return next(filter(os.path.isfile, _list_label_files(image)), None)


def _list_label_files(image: Path) -> list[Path]:
    """Lists where an image's label file may be: in ``labels`` instead of the last ``images``, or beside the image."""
    beside = image.with_suffix(".txt")
    parts = list(beside.parts[:-1])
    if "images" not in parts:
        return [beside]
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return [Path(*parts, beside.name), beside]


def _list_source(source: Path, root: Path, file: Path) -> list[Path]:
    """Lists the images of a folder or a list."""
    if os.path.isdir(source):
        return sorted(find_images(source))
    if os.path.isfile(source) and source.suffix.lower() == ".txt":
        return list_images(source, root=root)
    raise DataError(
        f"expected a folder of images or a .txt file that lists images, but there is none at {source}"
        f"{name_kind(source)}; correct data.train and data.val, or the paths in {file}"
    )


def _read_rows(file: Path, config: YoloConfig, tally: Tally) -> Iterator[tuple[int, list[float]]]:
    """Yields number, from 1, and values of each usable row; the others are counted."""
    text = file.read_bytes().decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = partial(_describe_line, file, number)
        row = _parse_row(line, key_points=config.key_points)
        if row is None:
            tally.add_problem(_BAD_ROW, place)
        elif not all(-_OVER <= value <= 1 + _OVER for value in row[1:]):
            tally.add_problem(_NOT_NORMALISED, place)
        elif row[0] not in config.names:
            tally.add_problem(_NO_CLASS, place)
        else:
            yield number, row


def _parse_row(line: str, *, key_points: bool) -> list[float] | None:
    """Parses a row: a class number, then a box or the corners of a polygon; None if it is neither."""
    if not line.isascii() or "_" in line:  # which Python's numbers may contain
        return None
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        return None
    if key_points:
        row = row[:5]
    count = len(row) - 1
    polygon = count >= 6 and count % 2 == 0
    return row if (count == 4 or polygon) and all(map(math.isfinite, row)) and row[0].is_integer() else None


def _convert_row(row: list[float], size: tuple[int, int]) -> dict[str, Any]:
    """Converts a row to COCO's category, box (xywh, pixels) and outline for an image of (height, width) pixels."""
    height, width = size
    category, *values = row
    if len(values) == 4:
        x, y, w, h = values
        return {
            "category_id": int(category),
            "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height],
        }
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    outline = [number for point in zip(xs, ys, strict=True) for number in point]
    return {"category_id": int(category), "bbox": box, "segmentation": [outline]}


def _describe_line(file: Path, line: int) -> str:
    return show_hidden(f"{file}:{line}")
