"""Reads COCO detection JSON as a split."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.image_files import ImageFiles, read_sizes
from gdetkd_cli.data.packed import PackedPaths, PackedRecords, PackedSizes, RecordPacker
from gdetkd_cli.data.readers.json_file import is_number, is_text, is_whole, read_json
from gdetkd_cli.data.readers.run_lengths import is_mask
from gdetkd_cli.data.readers.tally import Remark, Tally
from gdetkd_cli.data.split import DataProblem, Outline, Record, Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind

_TABLES = ("images", "annotations", "categories")
_ROUNDING = 0.01  # pixels; smaller sides and smaller distances over the image's edge are rounding errors

# The notes of a split, in this order.
_NEGATIVE = Remark("{n} image{s} without objects kept as negatives.")
_CROWD = Remark("{n} crowd annotation{s} left out of training and kept for evaluation.")
_CLIPPED = Remark("{n} annotation{s} with a box over the image's edge clipped.")
_NO_BOX = Remark("{n} annotation{s} dropped: the box is not four finite numbers.", drops=True)
_NO_AREA = Remark("{n} annotation{s} dropped: the box has no area inside the image.", drops=True)
_NO_IMAGE = Remark("{n} annotation{s} dropped: image_id is not among the images.", drops=True)
_NO_CATEGORY = Remark("{n} annotation{s} dropped: category_id is not among the categories.", drops=True)
_LEFT_OUT = Remark("{n} annotation{s} dropped: the category is not among the chosen classes.")
_CROWD_TEXT = Remark(
    "warning: {n} annotation{s} with an iscrowd other than the number 0 or 1: the text '1' is read as 1, all else as 0."
)
_REMARKS = (_NEGATIVE, _CROWD, _CLIPPED, _NO_BOX, _NO_AREA, _NO_IMAGE, _NO_CATEGORY, _LEFT_OUT, _CROWD_TEXT)

Tables = Mapping[str, Any]  # lists of objects, and `info`, an object if it is as the format says


def read_coco(
    *,
    annotations: Path,
    images: Path,
    classes: Sequence[str] | None = None,
    outlines: bool = False,
    bad: BadImages | None = None,
    problems: list[DataProblem] | None = None,
) -> Split:
    """Reads one annotation file. Images must exist, but are decoded only on demand.

    Args:
        images: the folder to which ``file_name`` is relative.
        classes: category names to use, label k for the k-th; by default all, in the order of their ids.
        outlines: whether to keep the objects' outlines.
        bad: collects the images that cannot be read; None: such an image is an error.
        problems: receives each annotation that is changed or dropped; None: these are only counted.

    Raises:
        DataError: the file or images are missing, the file is not COCO detection JSON, or ``classes`` does not
            fit its categories.
    """
    tables = _load(annotations)
    return build_split_from_tables(
        tables,
        source=annotations,
        images=images,
        classes=classes,
        outlines=outlines,
        bad=bad,
        tally=Tally(problems),
    )


def build_split_from_tables(
    tables: Tables,
    *,
    source: Path,
    images: Path,
    classes: Sequence[str] | None = None,
    outlines: bool = False,
    bad: BadImages | None = None,
    tally: Tally | None = None,
    describe_place: Callable[[int], str] | None = None,
    annotated: Collection[int | None] | None = None,
) -> Split:
    """Builds a split from COCO's three tables.

    Args:
        tables: images, annotations and categories; see ``mark_upright``.
        source: names the tables in messages.
        images, classes, outlines, bad: see ``read_coco``.
        tally: the remarks of a reader that made the tables; None: a new tally.
        describe_place: place of the annotation with an index, from 0; default: in ``source``.
        annotated: ids of the images that someone annotated; default: those with an annotation.
    """
    names = _read_category_names(tables["categories"], file=source)
    class_names = _choose_classes(classes, names=names, file=source)
    ids, kept, sizes = _find_images(tables["images"], folder=images, file=source, bad=bad)
    tally = tally or Tally()
    file_names = {image["id"]: image["file_name"] for image in tables["images"]}
    rows = {image_id: row for row, image_id in enumerate(ids)}
    labels = {name: label for label, name in enumerate(class_names, start=1)}
    packer = RecordPacker(outlines=outlines)
    for index, annotation in enumerate(tables["annotations"]):
        image_id, category = _read_id(annotation.get("image_id")), _read_id(annotation.get("category_id"))
        name = names.get(category)
        place = partial(describe_place or partial(_describe_place, source, file_names.get(image_id)), index)
        row = None if image_id is None else rows.get(image_id)
        if row is None:
            tally.add_problem(_NO_IMAGE, place)
        elif name is None:
            tally.add_problem(_NO_CATEGORY, place)
        elif name not in labels:
            tally.add(_LEFT_OUT)
        else:
            size = sizes[row]
            item = _convert_annotation(annotation, label=labels[name], size=size, tally=tally, place=place)
            if item is not None:
                packer.add(row, item, _convert_outline(annotation.get("segmentation"), size) if outlines else None)

    if annotated is None:
        annotated = {_read_id(annotation.get("image_id")) for annotation in tables["annotations"]}  # usable or not
    records = packer.build(ids, sizes, (image_id in annotated for image_id in ids))
    tally.add(_NEGATIVE, records.count_empty())
    return Split(
        name="/".join(source.absolute().parts[-2:]),
        class_names=class_names,
        records=records,
        read=ImageFiles(paths=PackedPaths(images, kept), sizes=PackedSizes(sizes), upright=_is_upright(tables)),
        notes=tuple(_format_notes(tally, len(tables["annotations"]))),
        bad=bad,
    )


def mark_upright(tables: Tables) -> Tables:
    """Marks annotations that belong to the upright images, whatever size these have; see ``ImageFiles``."""
    return {"info": {"upright": True}, **tables}


def _is_upright(tables: Tables) -> bool:
    info = tables.get("info")
    return isinstance(info, dict) and info.get("upright") is True


def _describe_place(source: Path, image: str | None, index: int) -> str:
    return f"{source}, annotation {index + 1}" + (f" (image {image})" if image is not None else "")


def _format_notes(tally: Tally, given: int) -> list[str]:
    """Returns the notes of a split; ``given`` annotations are counted without rows that were dropped before."""
    given += tally.count_dropped(before=_REMARKS)
    dropped = tally.count_dropped()
    notes = tally.format_notes(_REMARKS)
    if 2 * dropped > given:
        notes.append(f"warning: {dropped} of {given} annotations are dropped; check the boxes, ids and classes.")
    return notes


def align_classes(split: Split, class_names: tuple[str, ...]) -> Split:
    """Returns the split with labels that refer to another class list, matched by name.

    Args:
        class_names: the other list; it may have more classes than the split.

    Raises:
        DataError: a class of the split is not in ``class_names``.
    """
    if split.class_names == class_names:
        return split
    missing = [name for name in split.class_names if name not in class_names]
    if missing:
        advice = "choose the data's classes to match"
        if len(split.class_names) == len(class_names):
            names = shlex.quote(",".join(split.class_names))
            advice += (
                f"; if both lists mean the same classes in the same order, add --classes {names}, or in a recipe "
                "teacher.classes"
            )
        raise DataError(
            f"{split.name} has the classes {', '.join(missing)}, which are not among {', '.join(class_names)}; {advice}"
        )
    new_label: dict[object, int] = {
        label: class_names.index(name) + 1 for label, name in enumerate(split.class_names, start=1)
    }
    table = torch.tensor([0, *new_label.values()])
    if isinstance(split.records, PackedRecords):
        return replace(split, class_names=class_names, records=split.records.relabel(table))

    def relabel(record: Record) -> Record:
        truth = [{**item, "category_id": new_label[item["category_id"]]} for item in record.truth]
        return replace(record, labels=table[record.labels], truth=truth)

    return replace(split, class_names=class_names, records=[relabel(record) for record in split.records])


def _load(file: Path) -> Tables:
    """Reads the three tables of a COCO detection file, each a list of objects."""
    parsed = read_json(file, "COCO detection JSON")
    tables = parsed if isinstance(parsed, dict) else {}
    missing = [key for key in _TABLES if not _is_table(tables.get(key))]
    if missing:
        raise DataError(
            f"{file} should be COCO detection JSON with the lists {', '.join(_TABLES)}, but it has no list of objects "
            f"named {' or '.join(missing)}; give another file, or convert it"
        )
    return tables


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _read_id(value: object) -> int | None:
    """Reads an id; some tools write 7.0 for 7. None for anything else."""
    return int(value) if is_number(value) and int(value) == value else None


def _find_repeated(values: Iterable[object]) -> list[object]:
    """Returns the values that occur more than once."""
    return [value for value, times in Counter(values).items() if times > 1]


def _read_category_names(categories: Sequence[Mapping[str, Any]], *, file: Path) -> dict[object, str]:
    """Returns names by category id, in the order of the ids."""
    if not all(is_whole(c.get("id")) and is_text(c.get("name")) for c in categories):
        raise DataError(f"{file} has a category without a whole-number id and a name; correct its categories")
    for key in ("id", "name"):
        twice = _find_repeated(category[key] for category in categories)
        if twice:
            raise DataError(f"{file} has more than one category with the {key} {twice[0]!r}; give each its own")
    return {category["id"]: category["name"] for category in sorted(categories, key=lambda category: category["id"])}


def _choose_classes(classes: Sequence[str] | None, *, names: Mapping[object, str], file: Path) -> tuple[str, ...]:
    """Returns the chosen class names, or else all of the file's."""
    chosen = tuple(names.values()) if classes is None else tuple(classes)
    there = ", ".join(names.values()) or "none"
    unknown = [name for name in chosen if name not in names.values()]
    if unknown:
        raise DataError(f"{file} has no class {', '.join(unknown)}; its classes are: {there}")
    if not chosen or _find_repeated(chosen):
        raise DataError(
            f"expected at least one class name and no repeated ones, got {list(chosen)}; {file} has: {there}"
        )
    return chosen


def _find_images(
    entries: Sequence[Mapping[str, Any]], *, folder: Path, file: Path, bad: BadImages | None
) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """Returns ids, file names and (height, width) pixels of the images, after checking that the files exist."""
    if not entries:
        raise DataError(f"{file} lists no images; give a file with at least one")
    if not all(is_whole(e.get("id")) and isinstance(e.get("file_name"), str) for e in entries):
        raise DataError(f"{file} has an image without a whole-number id and a file_name; correct its images")
    twice = _find_repeated(entry["id"] for entry in entries)
    if twice:
        raise DataError(f"{file} has more than one image with the id {twice[0]}; give each its own")
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}{name_kind(folder)} for the images of {file}; give their folder")
    paths = [folder / entry["file_name"] for entry in entries]
    missing = [path for path in paths if not os.path.isfile(path)]  # unlike Path, also false for impossible names
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(paths)} images that {file} names are missing, {missing[0]} first"
            f"{name_kind(missing[0])}; give their folder, or add the missing files"
        )
    sizes = read_sizes(paths, [_read_size(entry) for entry in entries], bad)
    kept = [(entry["id"], entry["file_name"], size) for entry, size in zip(entries, sizes, strict=True) if size]
    return [one[0] for one in kept], [one[1] for one in kept], [one[2] for one in kept]


def _read_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns (height, width) pixels from the JSON; None if they are missing or invalid."""
    height, width = entry.get("height"), entry.get("width")
    if is_whole(height) and is_whole(width) and height > 0 and width > 0:
        return height, width
    return None


def _convert_annotation(
    annotation: Mapping[str, Any], *, label: int, size: tuple[int, int], tally: Tally, place: Callable[[], str]
) -> dict[str, object] | None:
    """Converts an annotation to the form of ``Record.truth``; None if its box is unusable.

    Args:
        label: 1..K.
        size: (height, width) pixels of the image.
    """
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        tally.add_problem(_NO_BOX, place)
        return None
    left, top, width, height = box
    corners = (left, top, left + width, top + height)
    x1, y1, x2, y2 = clipped = tuple(
        min(max(float(corner), 0.0), float(edge)) for corner, edge in zip(corners, (size[1], size[0]) * 2, strict=True)
    )
    if x2 - x1 < _ROUNDING or y2 - y1 < _ROUNDING:
        tally.add_problem(_NO_AREA, place)
        return None
    if any(abs(a - b) >= _ROUNDING for a, b in zip(corners, clipped, strict=True)):
        tally.add_problem(_CLIPPED, place)
    given = annotation.get("iscrowd", 0)
    if not isinstance(given, (int, float)) or given not in (0, 1):
        tally.add_problem(_CROWD_TEXT, place)
    crowd = given in (1, "1")
    tally.add(_CROWD, crowd)
    area = annotation.get("area")
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        # Larger than the image it would hide the object from the metrics of every size; 0 is a converter's "unknown".
        "area": float(area) if is_number(area) and 0 < area <= size[0] * size[1] else (x2 - x1) * (y2 - y1),
        "category_id": label,
        "iscrowd": int(crowd),
    }


def _convert_outline(segmentation: object, size: tuple[int, int]) -> Outline:
    """Converts polygons to arrays and keeps run lengths; None for anything else, and for what leaves the image."""
    if isinstance(segmentation, dict):
        return segmentation if is_mask(segmentation, size) else None
    if not isinstance(segmentation, list):
        return None
    reach = 2 * max(size)  # pixels; drawing does not end for points that are far away
    polygons = [
        p
        for p in segmentation
        if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(is_number(v) and abs(v) < reach for v in p)
    ]
    return [np.asarray(polygon, dtype=np.float32) for polygon in polygons] or None
