"""Reads BDD100K's detection labels: a JSON list of frames per split, in the format of 2018 or of ``det_20``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.readers.coco import build_split_from_tables
from gdetkd_cli.data.readers.json_file import is_number, read_json
from gdetkd_cli.data.readers.tally import Tally
from gdetkd_cli.data.split import DataProblem, Split
from gdetkd_cli.errors import DataError

BDD_CLASSES = (
    "pedestrian",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
    "traffic light",
    "traffic sign",
)
_OLD_NAMES = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle"}  # in the format of 2018


def read_bdd100k(
    *,
    labels: Path,
    images: Path,
    classes: Sequence[str] | None = None,
    bad: BadImages | None = None,
    problems: list[DataProblem] | None = None,
) -> Split:
    """Reads one label file. Frames without labels become images without objects; lanes and areas are skipped.

    Args:
        labels: ``det_train.json`` or ``bdd100k_labels_images_train.json``.
        images: the folder of the frames, for example ``images/100k/train``.
        classes: names to use; by default the ten of the detection task.
        bad, problems: as in ``read_coco``.

    Raises:
        DataError: the file or images are missing, or the file has another format.
    """
    names = list(classes or BDD_CLASSES)
    numbers = {name: number for number, name in enumerate(names, start=1)}
    tables: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
    for image_id, frame in enumerate(_read_frames(labels), start=1):
        tables["images"].append({"id": image_id, "file_name": frame["name"]})
        for label in frame.get("labels") or []:
            if label.get("box2d") is None:  # a lane or an area
                continue
            name = str(label.get("category"))
            attributes = label.get("attributes")
            tables["annotations"].append(
                {
                    "image_id": image_id,
                    "category_id": numbers.get(name if name in numbers else _OLD_NAMES.get(name, name)),
                    "bbox": _convert_box(label["box2d"]),
                    "iscrowd": int(isinstance(attributes, dict) and attributes.get("crowd") is True),
                }
            )
    if not any(a["category_id"] for a in tables["annotations"]):
        raise DataError(f"{labels} has no box of the classes {', '.join(names)}; give another file, or other classes")
    return build_split_from_tables(tables, source=labels, images=images, classes=names, bad=bad, tally=Tally(problems))


def read_first_frame(labels: Path) -> str:
    """Reads the name of a label file's first frame.

    Raises:
        DataError: the file has another format, or no frame.
    """
    frames = _read_frames(labels)
    if not frames:
        raise DataError(f"{labels} has no frames; give another file")
    return str(frames[0]["name"])


def _read_frames(file: Path) -> list[dict[str, Any]]:
    content = read_json(file, "BDD100K's detection labels")
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list) or not all(map(_is_frame, frames)):
        raise DataError(
            f"{file} should be BDD100K's list of frames, each with a name and a list of labels; give another file"
        )
    return frames


def _is_frame(frame: object) -> bool:
    if not isinstance(frame, dict) or not isinstance(frame.get("name"), str):
        return False
    labels = frame.get("labels")
    return labels is None or (isinstance(labels, list) and all(isinstance(label, dict) for label in labels))


def _convert_box(corners: object) -> list[float] | None:
    """Converts corners to xywh in pixels; None if they are not four numbers."""
    named = corners if isinstance(corners, dict) else {}
    found = [float(number) for key in ("x1", "y1", "x2", "y2") if is_number(number := named.get(key))]
    return [found[0], found[1], found[2] - found[0], found[3] - found[1]] if len(found) == 4 else None
