"""Writes detections: drawn into the images, as COCO JSON, as CSV, or as YOLO's text files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findfont
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from gdetkd_cli.data.readers.coco import mark_upright
from gdetkd_cli.files import write_encoded, write_text
from gdetkd_cli.structures import Detections
from gdetkd_cli.text import show_hidden

_DIGITS = 2  # of a box's pixels


@dataclass(frozen=True)
class PredictedImage:
    """The detections of one image.

    Attributes:
        name: of the image, with ``/`` between folders.
        size: (height, width) pixels.
        detections: boxes xyxy in the image's pixels.
    """

    name: str
    size: tuple[int, int]
    detections: Detections


def draw_detections(pixels: Tensor, detections: Detections, class_names: Sequence[str], path: Path) -> None:
    """Draws boxes with class and score into an image (3, H, W) uint8, and writes it.

    The suffix chooses the format; a path with another suffix gets ``.png`` at its end.
    """
    colours = [
        "#" + "".join(f"{round(255 * part):02x}" for part in colour)
        for colour in matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]  # a ListedColormap
    ]
    labels = detections.labels.tolist()
    texts = [
        show_hidden(f"{class_names[label - 1]} {score:.2f}")
        for label, score in zip(labels, detections.scores.tolist(), strict=True)
    ]
    side = max(pixels.shape[-2:])
    if labels:  # torchvision warns about an image without boxes
        pixels = draw_bounding_boxes(
            pixels,
            detections.boxes,
            labels=texts,
            colors=[colours[(label - 1) % len(colours)] for label in labels],
            width=max(1, round(side / 400)),
            font=findfont("DejaVu Sans"),  # matplotlib brings it
            font_size=max(9, round(side / 50)),
            fill_labels=True,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        kind, path = "PNG", path.with_name(f"{path.name}.png")
    drawn = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    write_encoded(path, partial(drawn.save, format=kind))


def write_coco(path: Path, images: Sequence[PredictedImage], class_names: Sequence[str]) -> None:
    """Writes a COCO data set whose annotations also have a ``score``; ids count from 1."""
    annotations = [
        {
            "image_id": number,
            "category_id": label,
            "bbox": [round(value, _DIGITS) for value in (x0, y0, x1 - x0, y1 - y0)],
            "area": round((x1 - x0) * (y1 - y0), _DIGITS),
            "iscrowd": 0,
            "score": round(score, 4),
        }
        for number, image in enumerate(images, start=1)
        for (x0, y0, x1, y1), label, score in list_rows(image)
    ]
    content = {
        "images": [
            {"id": number, "file_name": image.name, "height": image.size[0], "width": image.size[1]}
            for number, image in enumerate(images, start=1)
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)],
        "annotations": [{"id": number, **each} for number, each in enumerate(annotations, start=1)],
    }
    write_text(path, json.dumps(mark_upright(content)))


def write_csv(path: Path, images: Sequence[PredictedImage], class_names: Sequence[str]) -> None:
    """Writes a row per detection: image, class, score, and the corners of its box in pixels."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("image", "class", "score", "x0", "y0", "x1", "y1"))
    for image in images:
        for box, label, score in list_rows(image):
            rows.writerow((image.name, class_names[label - 1], f"{score:.4f}", *(f"{v:.{_DIGITS}f}" for v in box)))
    write_text(path, text.getvalue())


def write_yolo(folder: Path, images: Sequence[PredictedImage]) -> None:
    """Writes a text file per image, as Ultralytics does: class from 0, centre, width and height as fractions, score."""
    for image in images:
        height, width = image.size
        lines = [
            f"{label - 1} {(x0 + x1) / 2 / width:.6f} {(y0 + y1) / 2 / height:.6f} "
            f"{(x1 - x0) / width:.6f} {(y1 - y0) / height:.6f} {score:.4f}\n"
            for (x0, y0, x1, y1), label, score in list_rows(image)
        ]
        path = (folder / image.name).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(lines))


def list_rows(image: PredictedImage) -> list[tuple[list[float], int, float]]:
    """Returns (box, label, score) of each detection."""
    found = image.detections
    return list(zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True))
