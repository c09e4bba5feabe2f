"""Targets from the teacher: its confident detections stand for the truth of images without annotations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from gdetkd_cli.assembly.data import SPLITS, Which, needs_labels, unlabelled_split
from gdetkd_cli.assembly.detector import build_detector
from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.data.readers.coco import build_split_from_tables
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.engine.run_folder import write_text
from gdetkd_cli.errors import DataError
from gdetkd_cli.evaluation.predict import gather_predictions, predict_split
from gdetkd_cli.recipe.schema import CocoData, Data, DistillationRecipe, FolderData, TeacherLabels

Tables = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Labelled:
    """A split that a teacher labelled, the same as COCO's tables, and how many images there are to label."""

    split: Split
    tables: Tables
    images: int


def label_split(
    split: Split,
    data: CocoData | FolderData,
    teacher: Detector,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    most: int | None = None,
    observer: Observer = silent,
) -> Labelled:
    """Labels the images of a split; every process predicts its share and gets all.

    Args:
        split: of image files; its own truth is left aside. Without classes, it gets all of the teacher's.
        data: the recipe's block that it is from.
        teacher: on ``device``.
        device: where it runs.
        rank: which of ``world_size`` processes asks.
        world_size: processes.
        most: images to label, the first ones; None: all.
        observer: is told how far it is.

    Raises:
        DataError: a class that the teacher does not know, or it finds nothing at all.
        PairError: its detections cannot be read, or their classes are not known.
    """
    teacher.check_detects()
    folder = data.root / data.train_images
    total = len(split)
    split = replace(split, records=split.records[:most])
    options = data.labels if isinstance(data.labels, TeacherLabels) else TeacherLabels()
    class_names = split.class_names or teacher.class_names
    strangers = [n for n in (*class_names, *options.per_class) if n not in teacher.class_names]
    if strangers:
        raise DataError(
            f"the teacher cannot label {', '.join(strangers)}; its classes are: {', '.join(teacher.class_names)}"
        )
    batches = validation_batches(split=split, batch_size=1, rank=rank, world_size=world_size)
    progress = report_every(observer, "labelled", ceil(len(split) / world_size))
    found = gather_predictions(predict_split(teacher, batches, device, progress))
    assert isinstance(split.read, ImageFiles), "only image files are labelled"
    categories = {name: number for number, name in enumerate(class_names, start=1)}
    annotations: list[dict[str, Any]] = []
    for record in split.records:
        one = found[record.image_id]
        for box, score, number in zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True):
            name = teacher.class_names[number - 1]
            if name in categories and score >= options.per_class.get(name, options.score):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record.image_id,
                        "category_id": categories[name],
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": (box[2] - box[0]) * (box[3] - box[1]),
                        "iscrowd": 0,
                        "score": score,
                    }
                )
    if not annotations:
        best = max((float(d.scores.max()) for d in found.values() if len(d.scores)), default=0.0)
        raise DataError(
            f"the teacher detects nothing in {split.name} with a score of {options.score:g} or more (its best is "
            f"{best:.2f}); lower data.labels.score, or check what values its images should have (teacher.input)"
        )
    tables = {
        "images": [
            {
                "id": record.image_id,
                "file_name": path.relative_to(folder).as_posix(),
                "height": record.size[0],
                "width": record.size[1],
            }
            for record, path in zip(split.records, split.read.paths, strict=False)
        ],
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
        "annotations": annotations,
    }
    return Labelled(build_split_from_tables(tables, source=Path(split.name), images=folder), tables, total)


def write_labels(folder: Path, labels: Mapping[Which, Tables]) -> None:
    """Writes the tables of each split as ``SPLIT.json``, COCO's format."""
    folder.mkdir(exist_ok=True)
    for which, tables in labels.items():
        write_text(folder / f"{which}.json", json.dumps(tables))


def describe_labels(labelled: Labelled) -> str:
    """How many targets of each class there are, for people."""
    split = labelled.split
    counts = Counter(int(label) for record in split.records for label in record.labels)
    each = ", ".join(f"{name} {counts[number]}" for number, name in enumerate(split.class_names, start=1))
    images = f"{len(split)} images" + (f" of {labelled.images}" if len(split) < labelled.images else "")
    return f"{split.name}: labelled by the teacher, {images}, {sum(counts.values())} objects ({each})"


def with_labels(recipe: DistillationRecipe, folder: Path, device: str, observer: Observer) -> Data:
    """The recipe's data with annotations for every image: what its teacher has to label is labelled now, once.

    Args:
        recipe: with a teacher.
        folder: where the labels are kept, as COCO files; those that are there already are taken.
        device: where the teacher runs.
        observer: is told of it.

    Raises:
        GDetKDError: the teacher cannot label the images.
    """
    data = recipe.data
    wanted: list[Which] = [which for which in SPLITS if needs_labels(data, which)]
    if not wanted:
        return data
    assert isinstance(data, CocoData | FolderData)
    if not all((folder / f"{which}.json").exists() for which in wanted):
        splits = {which: unlabelled_split(data, which) for which in wanted}
        teacher = build_detector(recipe.teacher, splits["train"].class_names, recipe.seed, keep_classes=True)
        teacher.detector.module.to(device)
        made = {
            which: label_split(split, data, teacher.detector, device=torch.device(device), observer=observer)
            for which, split in splits.items()
        }
        for one in made.values():
            observer(Note(describe_labels(one)))
        folder.mkdir(parents=True, exist_ok=True)
        write_labels(folder, {which: one.tables for which, one in made.items()})
    own = {"train": folder.resolve() / "train.json", "train_images": data.train_images}
    if "val" in wanted:
        own |= {"val": folder.resolve() / "val.json", "val_images": data.train_images}
    else:
        assert data.val is not None
        own |= {"val": data.val, "val_images": data.val_images}
    return CocoData(format="coco", root=data.root, classes=data.classes, labels="annotations", **own)
