"""Detections in a file: compressed arrays of numpy, which hold no code.

Counts: N images, M detections of all images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from gdetkd_cli.errors import DataError
from gdetkd_cli.files import write_file
from gdetkd_cli.structures import Detections


@dataclass(frozen=True)
class StoredDetections:
    """The detections of a detector.

    Attributes:
        class_names: K names; label k is ``class_names[k - 1]``.
        by_image: by image id, boxes in pixels of the stored image; every predicted image is a key.
    """

    class_names: tuple[str, ...]
    by_image: dict[int, Detections]

    def relabel(self, class_names: Sequence[str]) -> dict[int, Detections]:
        """Returns the detections with labels of another class list, matched by name; others are left out."""
        if tuple(class_names) == self.class_names:
            return self.by_image
        places = {name: place for place, name in enumerate(class_names, start=1)}
        table = torch.tensor([0, *(places.get(name, 0) for name in self.class_names)])
        renamed = {}
        for image_id, found in self.by_image.items():
            labels = table[found.labels]
            kept = labels > 0
            renamed[image_id] = Detections(found.boxes[kept], found.scores[kept], labels[kept])
        return renamed


def write_detections(path: Path, class_names: Sequence[str], detections: Mapping[int, Detections]) -> None:
    """Writes detections: ``images`` and ``counts`` (N,), ``boxes`` (M, 4), ``scores`` and ``labels`` (M,), ``classes``.

    Args:
        path: the .npz file; its folder exists.
        class_names: K names; label k is ``class_names[k - 1]``.
        detections: by image id, boxes xyxy in pixels of the stored image.
    """
    found = list(detections.values())
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    arrays: dict[str, Any] = {
        "images": np.array(list(detections), dtype=np.int64),
        "counts": np.array([len(one.scores) for one in found], dtype=np.int64),
        "boxes": torch.cat([one.boxes.float() for one in [empty, *found]]).numpy(),
        "scores": torch.cat([one.scores.float() for one in [empty, *found]]).numpy(),
        "labels": torch.cat([one.labels for one in [empty, *found]]).numpy().astype(np.int32),
        "classes": np.array(list(class_names), dtype=np.str_),
    }
    write_file(path, lambda file: np.savez_compressed(file, **arrays))


def read_detections(path: Path) -> StoredDetections:
    """Reads what ``write_detections`` wrote.

    Raises:
        DataError: the file is damaged, or has other content.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, counts = file["images"], file["counts"].tolist()
            parts = [torch.from_numpy(file[name]).split(counts) for name in ("boxes", "scores", "labels")]
            classes = tuple(str(name) for name in file["classes"])
    except (ValueError, KeyError, EOFError, BadZipFile, RuntimeError) as error:
        raise DataError(f"{path} is damaged, or no file of detections that gdetkd wrote ({error})") from error
    found = (Detections(boxes, scores, labels.long()) for boxes, scores, labels in zip(*parts, strict=True))
    return StoredDetections(classes, dict(zip(images.tolist(), found, strict=True)))
