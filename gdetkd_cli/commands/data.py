"""Describes a data set: its format, counts, problems, and a sheet of annotated images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdetkd_cli.assembly.data import SPLITS, Which, check_headers, needs_labels, read_split
from gdetkd_cli.assembly.find_data import find_block
from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.repeats import find_repeated_images
from gdetkd_cli.data.split import DataProblem, Split
from gdetkd_cli.engine.events import Observer, silent
from gdetkd_cli.errors import OutputError
from gdetkd_cli.recipe.base import MOST
from gdetkd_cli.recipe.schema import Data
from gdetkd_cli.report.figures import check_drawable
from gdetkd_cli.report.images import draw_sheet

_SMALL, _MEDIUM = 32**2, 96**2  # square pixels, as in COCO's metrics
DEFAULT_SHEET = Path("data.png")


@dataclass(frozen=True)
class SplitSummary:
    """Counts of a split.

    Attributes:
        split: ``train`` or ``val``.
        name: names its files.
        annotated: whether it has annotations; otherwise the teacher labels it.
        images: number of images, without those whose size cannot be read.
        without_objects: number of images without boxes.
        boxes: number of boxes, without crowds.
        crowds: number of boxes that training leaves out.
        small, medium, large: number of boxes by area, divided at 32 x 32 and 96 x 96 pixels, as in COCO's metrics.
        per_class: number of boxes by class name.
    """

    split: str
    name: str
    annotated: bool
    images: int
    without_objects: int
    boxes: int
    crowds: int
    small: int
    medium: int
    large: int
    per_class: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """A described data set.

    Attributes:
        format: of the annotations, as in a recipe.
        data: the recipe's data block, in which only the fields found are set.
        splits: training, then validation.
        problems: each annotation or image that is changed or left out.
        sheet: the drawn images; None if no image could be drawn.
    """

    source: str
    format: str
    data: dict[str, Any]
    splits: tuple[SplitSummary, ...]
    problems: tuple[DataProblem, ...]
    sheet: Path | None


def run_data(source: str, *, data: Data | Path, sheet: Path | None = None, observer: Observer = silent) -> DataReport:
    """Reads both splits, checks the header of every image, and draws a sheet of training images.

    Args:
        source: name of the data, for the report.
        sheet: the image to write; None: ``data.png``, or ``data-2.png`` and so on if it exists.

    Raises:
        OutputError: the sheet exists, or its suffix is unknown.
        DataError: the data cannot be read at all.
    """
    path = sheet or _choose_free(DEFAULT_SHEET)
    check_drawable(path)
    if path.exists():
        raise OutputError(f"{path} already exists; choose another file with --sheet")
    block = find_block(data) if isinstance(data, Path) else data
    problems: list[DataProblem] = []
    splits = {which: _read_checked(block, which, problems, observer) for which in SPLITS}
    repeated = find_repeated_images(splits["train"], splits["val"])
    problems += [DataProblem(str(file), "is a training image and a validation image") for file in repeated]
    drawn = draw_sheet(splits["train"], path)
    return DataReport(
        source=source,
        format=block.format,
        data=block.model_dump(mode="json", exclude_unset=True),
        splits=tuple(
            _summarise(split, which, annotated=not needs_labels(block, which)) for which, split in splits.items()
        ),
        problems=tuple(problems),
        sheet=path if drawn else None,
    )


def _choose_free(path: Path) -> Path:
    """Returns the path, or the first of ``NAME-2``, ``NAME-3``, ... that does not exist."""
    number = 2
    free = path
    while free.exists():
        free = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return free


def _read_checked(data: Data, which: Which, problems: list[DataProblem], observer: Observer) -> Split:
    """Reads a split and the header of every image; adds all problems."""
    bad = BadImages(MOST)
    split = read_split(data, which, bad=bad, problems=problems)
    check_headers([split], observer)
    problems += [DataProblem(str(error.path), error.problem) for error in bad.errors]
    return split


def _summarise(split: Split, which: Which, *, annotated: bool) -> SplitSummary:
    objects = [item for record in split.records for item in record.truth if not item["iscrowd"]]
    areas = [float(str(item["area"])) for item in objects]
    small, medium = sum(area < _SMALL for area in areas), sum(_SMALL <= area < _MEDIUM for area in areas)
    labels = Counter(item["category_id"] for item in objects)
    return SplitSummary(
        split=which,
        name=split.name,
        annotated=annotated,
        images=len(split),
        without_objects=sum(len(record.labels) == 0 for record in split.records),
        boxes=len(objects),
        crowds=sum(len(record.truth) for record in split.records) - len(objects),
        small=small,
        medium=medium,
        large=len(areas) - small - medium,
        per_class={name: labels[number] for number, name in enumerate(split.class_names, start=1)},
        notes=split.notes,
    )
