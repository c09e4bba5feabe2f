"""Labels images without annotations with the teacher's confident detections."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from gdetkd_cli.assembly.data import (
    SPLITS,
    Unlabelled,
    Which,
    build_split,
    get_image_folder,
    needs_labels,
    read_unlabelled_split,
)
from gdetkd_cli.assembly.detector import build_detector
from gdetkd_cli.data.folds import select_images
from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.readers.coco import Tables, build_split_from_tables, mark_upright
from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.errors import DataError
from gdetkd_cli.evaluation.predict import gather_predictions, list_predicted, predict_split
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.schema import CocoData, Data, DistillationRecipe, TeacherLabels, YoloData
from gdetkd_cli.structures import Detections


@dataclass(frozen=True)
class LabelledSplit:
    """A split that a teacher labelled.

    Attributes:
        tables: the same as COCO's tables.
        images: number of images in the whole split.
        by_teacher: number of images of ``split`` that the teacher labelled; the others have annotations.
    """

    split: Split
    tables: Tables
    images: int
    by_teacher: int


def label_split(
    split: Split,
    data: Unlabelled,
    teacher: Detector,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    most: int | None = None,
    observer: Observer = silent,
) -> LabelledSplit:
    """Labels the images of a split. Every process predicts its share and receives all detections.

    Args:
        split: a split of image files. Without classes, it takes the teacher's. Its annotations are ignored, unless
            the teacher labels only the images without any.
        data: the recipe's block of the split.
        teacher: the detector that labels, on ``device``.
        rank: number of this process, from 0.
        most: maximum number of images to label, from the first; None: all.

    Raises:
        DataError: the teacher lacks a class, or detects nothing.
        PairError: the teacher's detections cannot be read, or their classes are unknown.
    """
    teacher.check_detects()
    total = len(split)
    split = replace(split, records=split.records[:most])
    options = data.labels
    if not isinstance(options, TeacherLabels):
        options = TeacherLabels(images="unlabelled" if options == "mixed" else "all")
    class_names = split.class_names or teacher.class_names
    _check_classes((*class_names, *options.per_class), teacher)
    keeps = options.images == "unlabelled"
    own = [record for record in split.records if keeps and record.annotated]
    asked = select_images(split, [i for i, each in enumerate(split.records) if not (keeps and each.annotated)])
    batches = load_validation_batches(split=asked, batch_size=1, rank=rank, world_size=world_size)
    progress = report_every(observer, "labelled", ceil(len(asked) / world_size))
    detections = gather_predictions(predict_split(teacher, batches, device, progress))
    predicted = list_predicted(asked, detections)
    categories = {name: number for number, name in enumerate(class_names, start=1)}
    annotations = _build_annotations(predicted, detections, teacher.class_names, categories, options)
    annotations = [*_list_truth(own), *annotations]
    if not annotations:
        best = max((float(one.scores.max()) for one in detections.values() if len(one.scores)), default=0.0)
        raise DataError(
            f"the teacher detects nothing in {split.name} with a score of {options.score:g} or more (highest score: "
            f"{best:.2f}); lower data.labels.score, or check the teacher's input format (teacher.input)"
        )
    read = split.read
    assert isinstance(read, ImageFiles), "only image files can be labelled"
    kept = {record.image_id for record in (*own, *predicted)}
    files = zip(split.records, read.paths, strict=False)
    folder = get_image_folder(data)
    images = [(record, path) for record, path in files if record.image_id in kept]
    tables = _build_tables(images, folder, categories, annotations, upright=read.upright)
    labelled = build_split_from_tables(tables, source=Path(split.name), images=folder, bad=split.bad)
    return LabelledSplit(labelled, tables, total, by_teacher=len(predicted))


def _check_classes(names: Iterable[str], teacher: Detector) -> None:
    """Checks that the teacher has all classes."""
    unknown = [name for name in names if name not in teacher.class_names]
    if unknown:
        raise DataError(
            f"the teacher cannot label {', '.join(unknown)}; choose from its classes: {', '.join(teacher.class_names)}"
        )


def _list_truth(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Lists the annotations of images as COCO's; their category is the label."""
    return ({**item, "image_id": record.image_id} for record in records for item in record.truth)


def _build_annotations(
    records: Sequence[Record],
    detections: Mapping[int, Detections],
    teacher_classes: Sequence[str],
    categories: Mapping[str, int],
    options: TeacherLabels,
) -> list[dict[str, Any]]:
    """Converts the confident detections in the categories to COCO annotations."""
    annotations: list[dict[str, Any]] = []
    for record in records:
        one = detections[record.image_id]
        for box, score, number in zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True):
            name = teacher_classes[number - 1]
            if name in categories and score >= options.per_class.get(name, options.score):
                annotations.append(
                    {
                        "image_id": record.image_id,
                        "category_id": categories[name],
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": (box[2] - box[0]) * (box[3] - box[1]),
                        "iscrowd": 0,
                        "score": score,
                    }
                )
    return annotations


def _build_tables(
    images: Sequence[tuple[Record, Path]],
    folder: Path,
    categories: Mapping[str, int],
    annotations: list[dict[str, Any]],
    *,
    upright: bool,
) -> Tables:
    """Builds COCO's tables; file names are relative to ``folder``, and ``upright`` is as in ``ImageFiles``."""
    tables = {
        "images": [
            {
                "id": record.image_id,
                "file_name": Path(os.path.relpath(path, folder)).as_posix(),
                "height": record.size[0],
                "width": record.size[1],
            }
            for record, path in images
        ],
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
    return mark_upright(tables) if upright else tables


def write_labels(folder: Path, labels: Mapping[Which, Tables]) -> None:
    """Writes each split's tables as ``SPLIT.json`` in COCO format."""
    folder.mkdir(exist_ok=True)
    for which, tables in labels.items():
        write_text(folder / f"{which}.json", json.dumps(tables))


def describe_labels(labelled: LabelledSplit) -> str:
    """Describes the number of targets per class."""
    split = labelled.split
    counts = Counter(int(label) for record in split.records for label in record.labels)
    each = ", ".join(f"{name} {counts[number]}" for number, name in enumerate(split.class_names, start=1))
    images = f"{len(split)} images" + (f" of {labelled.images}" if len(split) < labelled.images else "")
    images += f", {len(split) - labelled.by_teacher} annotated" if labelled.by_teacher < len(split) else ""
    return f"{split.name}: labelled by the teacher, {images}, {sum(counts.values())} objects ({each})"


def label_data(recipe: DistillationRecipe, folder: Path, device: str, observer: Observer) -> Data:
    """Returns the recipe's data with annotations for every image; the teacher labels images that have none.

    Args:
        recipe: the recipe of the data and the teacher.
        folder: folder of the labels as COCO files; existing labels are reused.

    Raises:
        GDetKDError: the teacher cannot label the images.
    """
    data = recipe.data
    missing: list[Which] = [which for which in SPLITS if needs_labels(data, which)]
    if not missing:
        return data
    assert isinstance(data, Unlabelled)
    if not all((folder / f"{which}.json").exists() for which in missing):
        splits = {which: read_unlabelled_split(data, which) for which in missing}
        teacher = build_detector(recipe.teacher, splits["train"].class_names, recipe.seed, keep_classes=True)
        teacher.detector.module.to(device)
        labelled = {
            which: label_split(split, data, teacher.detector, device=torch.device(device), observer=observer)
            for which, split in splits.items()
        }
        for one in labelled.values():
            observer(Note(describe_labels(one)))
        folder.mkdir(parents=True, exist_ok=True)
        write_labels(folder, {which: one.tables for which, one in labelled.items()})
    images = Path() if isinstance(data, YoloData) else data.train_images
    paths = {"train": folder.resolve() / "train.json", "train_images": images}
    if isinstance(data, YoloData) or data.val is None:
        if "val" not in missing:
            write_labels(folder, {"val": _convert_split(build_split(data, "val"), data.root / images)})
        paths |= {"val": folder.resolve() / "val.json", "val_images": images}
    else:
        paths |= {"val": data.val, "val_images": data.val_images}
    same = {name: getattr(data, name) for name in ("root", "classes", "on_bad_sample", "max_bad_samples")}
    return CocoData(format="coco", labels="annotations", **same, **paths)


def _convert_split(split: Split, folder: Path) -> Tables:
    """Converts an annotated split to COCO's tables, with file names relative to ``folder``."""
    assert isinstance(split.read, ImageFiles)
    categories = {name: number for number, name in enumerate(split.class_names, start=1)}
    images = list(zip(split.records, split.read.paths, strict=True))
    return _build_tables(images, folder, categories, list(_list_truth(split.records)), upright=split.read.upright)
