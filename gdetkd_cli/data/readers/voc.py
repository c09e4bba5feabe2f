"""Pascal VOC: one XML file a image, and lists of image names. LabelImg and its kin write the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gdetkd_cli.data.readers.coco import split_of
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError

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


def read_voc(*, lists: Sequence[Path], root: Path, classes: Sequence[str] | None = None) -> Split:
    """Reads the images that lists of names name.

    Objects marked ``difficult`` are treated as COCO's crowds: left out of training, and neither wanted nor punished in
    evaluation, as in VOC's own.

    Args:
        lists: files of names, one a line, as ``VOC2007/ImageSets/Main/trainval.txt``; the folders ``Annotations`` and
            ``JPEGImages`` stand beside ``ImageSets``.
        root: the folder that all of them lie in.
        classes: names to use; by default the twenty of Pascal VOC.

    Raises:
        DataError: a file is missing or not as described, or none of the objects is of the classes.
    """
    names = list(classes or VOC_CLASSES)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    others: set[str] = set()
    for listing in lists:
        for stem in _stems(listing):
            year = listing.parents[2]
            tree = _parsed(year / "Annotations" / f"{stem}.xml")
            image = _image(year / "JPEGImages", stem)
            image_id = len(images) + 1
            images.append({"id": image_id, "file_name": str(image.relative_to(root)), **_size(tree)})
            for item in tree.iter("object"):
                name = (item.findtext("name") or "").strip()
                if name not in numbers:
                    others.add(name)
                annotations.append(
                    {
                        "image_id": image_id,
                        "category_id": numbers.get(name),
                        "bbox": _box(item),
                        "iscrowd": int((item.findtext("difficult") or "0").strip() == "1"),
                    }
                )
    if annotations and all(a["category_id"] is None for a in annotations):
        raise DataError(
            f"{lists[0]} names no object of the classes {', '.join(names[:3])}, ...; the objects are "
            f"{', '.join(sorted(others)[:8])}: name those under data.classes"
        )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    tables = {"images": images, "annotations": annotations, "categories": categories}
    return split_of(tables, source=lists[0], images=root, classes=names)


def names_in(lists: Sequence[Path]) -> set[str]:
    """The names of the objects in the listed images."""
    trees = (
        _parsed(listing.parents[2] / "Annotations" / f"{stem}.xml") for listing in lists for stem in _stems(listing)
    )
    return {(item.findtext("name") or "").strip() for tree in trees for item in tree.iter("object")}


def _stems(listing: Path) -> list[str]:
    """The names in a list; of a class's own list (name, then 1, 0 or -1) those that have it."""
    if not listing.is_file():
        raise DataError(f"There is no list {listing}: give a file of image names, as ImageSets/Main/trainval.txt.")
    if len(listing.absolute().parents) < 3 or listing.parents[1].name != "ImageSets":
        raise DataError(f"The list {listing} should lie in ImageSets/Main, beside Annotations and JPEGImages.")
    rows = [line.split() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) > 2 for row in rows):
        raise DataError(f"{listing} should have one image name a line, but one is {' '.join(rows[0])!r}.")
    return [row[0] for row in rows if len(row) == 1 or row[1] != "-1"]


def _parsed(file: Path) -> ElementTree.Element:
    if not file.is_file():
        raise DataError(f"There is no annotation {file}: complete the folder, or correct the list.")
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{file} should be VOC's XML, but it cannot be read ({error}).") from error


def _image(folder: Path, stem: str) -> Path:
    for ending in _ENDINGS:
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    raise DataError(f"There is no image {folder / stem}.jpg: give the folder that has JPEGImages, or complete it.")


def _size(tree: ElementTree.Element) -> dict[str, int]:
    """Height and width where the file has them; else they are read from the image."""
    sides = {side: _number(tree.find(f"size/{side}")) for side in ("height", "width")}
    return {side: round(value) for side, value in sides.items() if value is not None and value > 0}


def _box(item: ElementTree.Element) -> list[float] | None:
    """xywh in pixels; VOC counts pixels from 1 and both ends in."""
    corners = [_number(item.find(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = corners
    if left is None or top is None or right is None or bottom is None:
        return None
    return [left - 1, top - 1, right - left + 1, bottom - top + 1]


def _number(element: ElementTree.Element | None) -> float | None:
    try:
        return float(element.text) if element is not None and element.text else None
    except ValueError:
        return None
