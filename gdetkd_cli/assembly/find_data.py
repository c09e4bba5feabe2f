"""Finds the format and files of a data folder, and describes them as a recipe's data block."""

from __future__ import annotations

from pathlib import Path

from gdetkd_cli.assembly.data import SPLITS, read_split
from gdetkd_cli.data.readers.folder import check_no_labels
from gdetkd_cli.data.readers.layout import (
    check_no_annotations,
    find_bdd100k,
    find_detection_files,
    find_layout,
    find_voc_lists,
)
from gdetkd_cli.data.readers.voc import VOC_CLASSES, read_object_names
from gdetkd_cli.data.readers.yolo_layout import find_yolo
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.events import Note, Observer
from gdetkd_cli.recipe.schema import Bdd100kData, CocoData, Data, FolderData, VocData, YoloData


def find_data(folder: Path, observer: Observer) -> tuple[Data, Split]:
    """Returns the recipe's data block for a folder, in which only the fields found are set, and the training split.

    Args:
        folder: images with COCO, YOLO, VOC or BDD100K annotations, or images alone.

    Raises:
        DataError: the folder has no images, or its annotations have another format.
    """
    data = find_block(folder)
    train, val = (read_split(data, which) for which in SPLITS)
    if isinstance(data, CocoData | YoloData | VocData) and data.val is None:
        observer(Note("no validation split: every tenth image is held out (data.val: null)"))
    counts = f"{len(train)} training and {len(val)} validation images"
    if isinstance(data, FolderData):
        observer(Note(f"no annotations: the teacher will label {counts}"))
    else:
        observer(Note(f"{counts}, classes: {', '.join(train.class_names)}"))
    return data, train


def find_block(folder: Path) -> Data:
    """Returns the recipe's data block for a folder, in which only the fields found are set.

    Raises:
        DataError: the folder does not exist, lacks a split, or has annotations of another format.
    """
    if found := find_yolo(folder):
        defaults = YoloData(format="yolo")
        fields = {name: value for name, value in vars(found).items() if value != getattr(defaults, name)}
        return YoloData(format="yolo", root=folder, **fields)
    if files := find_detection_files(folder):
        paths = vars(find_layout(folder, files))
        if paths["val"] is None:
            del paths["val_images"]
        return CocoData(format="coco", root=folder, **paths)
    if lists := find_voc_lists(folder):
        train, val = lists
        names = sorted(read_object_names([folder / path for path in (*train, *(val or ()))]))
        classes = {} if set(names) <= set(VOC_CLASSES) else {"classes": names}
        return VocData(format="voc", root=folder, train=train, val=val, **classes)
    if layout := find_bdd100k(folder):
        return Bdd100kData(format="bdd100k", root=folder, **vars(layout))
    check_no_annotations(folder)
    check_no_labels(folder)
    return FolderData(format="folder", root=folder)
