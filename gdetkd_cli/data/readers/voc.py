"""Reads Pascal VOC: one XML file per image, and lists of image names. LabelImg and similar tools write the same."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.readers.coco import build_split_from_tables
from gdetkd_cli.data.readers.tally import Tally
from gdetkd_cli.data.split import DataProblem, Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def read_voc(
    *,
    lists: Sequence[Path],
    root: Path,
    classes: Sequence[str] | None = None,
    bad: BadImages | None = None,
    problems: list[DataProblem] | None = None,
) -> Split:
    """Reads the images in lists of image names.

    Objects marked ``difficult`` are treated like COCO's crowds: left out of training and ignored in evaluation, as in
    VOC's own evaluation.

    Args:
        lists: files with one image name per line, for example ``VOC2007/ImageSets/Main/trainval.txt``; the folders
            ``Annotations`` and ``JPEGImages`` are beside ``ImageSets``.
        root: the folder that contains all of them.
        classes: names to use; by default the twenty of Pascal VOC.
        bad, problems: as in ``read_coco``.

    Raises:
        DataError: a file is missing or malformed, or no object belongs to the classes.
    """
    names = list(classes or VOC_CLASSES)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    others: set[str] = set()
    for year, name in _list_images(lists):
        tree = _parse(_locate(year, name))
        image = _find_image(year / "JPEGImages", name)
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": os.path.relpath(image, root), **_read_size(tree)})
        for item in tree.iter("object"):
            kind = (item.findtext("name") or "").strip()
            if kind not in numbers:
                others.add(kind)
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": numbers.get(kind),
                    "bbox": _read_box(item),
                    "iscrowd": int((item.findtext("difficult") or "0").strip() == "1"),
                }
            )
    if annotations and all(a["category_id"] is None for a in annotations):
        raise DataError(
            f"{lists[0]} has no object of the classes {', '.join(names[:3])}, ...; its objects are "
            f"{', '.join(sorted(others)[:8])}; name these under data.classes"
        )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    tables = {"images": images, "annotations": annotations, "categories": categories}
    return build_split_from_tables(tables, source=lists[0], images=root, classes=names, bad=bad, tally=Tally(problems))


def read_object_names(lists: Sequence[Path]) -> set[str]:
    """Reads the names of the objects in the listed images."""
    trees = (_parse(_locate(year, name)) for year, name in _list_images(lists))
    return {(item.findtext("name") or "").strip() for tree in trees for item in tree.iter("object")}


def _list_images(lists: Sequence[Path]) -> list[tuple[Path, str]]:
    """Lists the folder of the year and the name, which may contain folders, of the listed images, each once."""
    found = ((listing.absolute().parents[2], name) for listing in lists for name in _read_list(listing))
    return list(dict.fromkeys(found))


def _locate(year: Path, name: str) -> Path:
    return year / "Annotations" / f"{name}.xml"


def _read_list(listing: Path) -> Iterator[str]:
    """Reads a list's image names; from a list of one class (name, then 1, 0 or -1) those without -1."""
    if not listing.is_file():
        raise DataError(
            f"there is no list {listing}{name_kind(listing)}; give a file of image names, such as "
            "ImageSets/Main/trainval.txt"
        )
    if listing.absolute().parents[1].name != "ImageSets":
        raise DataError(
            f"the list {listing} should be in ImageSets/Main, beside Annotations and JPEGImages; move it there"
        )
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{listing} should be a list of image names, but it is not UTF-8 text; replace it") from error
    year = listing.absolute().parents[2]
    for line in filter(None, lines):
        words = line.split()
        if len(words) == 1 or os.path.isfile(_locate(year, line)):  # a name may have spaces
            yield line
        elif len(words) > 2 or words[1] not in ("-1", "0", "1"):
            raise DataError(f"{listing} should have one image name per line, but it has {line!r}; correct the list")
        elif words[1] != "-1":
            yield words[0]


def _parse(file: Path) -> ElementTree.Element:
    if not os.path.isfile(file):
        raise DataError(f"there is no annotation {file}{name_kind(file)}; complete the folder, or correct the list")
    try:
        return ElementTree.parse(file).getroot()  # noqa: S314  # expat reads no external entity, and refuses bombs
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of the encoding that it names
        raise DataError(f"{file} should be VOC's XML, but it cannot be read ({error}); replace the file") from error


def _find_image(folder: Path, stem: str) -> Path:
    for ending in _ENDINGS:
        if os.path.isfile(folder / (stem + ending)):
            return folder / (stem + ending)
    image = folder / f"{stem}.jpg"
    raise DataError(
        f"there is no image {image}{name_kind(image)}; give the folder that contains JPEGImages, or add the file"
    )


def _read_size(tree: ElementTree.Element) -> dict[str, int]:
    """Reads height and width; those missing here are later read from the image."""
    sides = {side: _read_number(tree.find(f"size/{side}")) for side in ("height", "width")}
    return {side: round(value) for side, value in sides.items() if value is not None and value > 0}


def _read_box(item: ElementTree.Element) -> list[float] | None:
    """Reads xywh in pixels. VOC counts pixels from 1 and includes both ends."""
    corners = [_read_number(item.find(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = corners
    if left is None or top is None or right is None or bottom is None:
        return None
    return [left - 1, top - 1, right - left + 1, bottom - top + 1]


def _read_number(element: ElementTree.Element | None) -> float | None:
    try:
        number = float(element.text) if element is not None and element.text else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
