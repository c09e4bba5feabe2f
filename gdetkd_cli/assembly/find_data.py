"""Finds the format and files of a data folder, and describes them as a recipe's data block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdetkd_cli import assembly
from gdetkd_cli.data.readers.bdd100k import read_bdd100k
from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.readers.folder import check_no_labels, read_folder
from gdetkd_cli.data.readers.layout import Layout, find_bdd100k, find_detection_files, find_layout, find_voc_lists
from gdetkd_cli.data.readers.voc import VOC_CLASSES, read_object_names, read_voc
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.events import Note, Observer, silent


def find_data(folder: Path, observer: Observer = silent) -> tuple[dict[str, Any], Split]:
    """Returns the recipe's data block for a folder, and the training split.

    Args:
        folder: images with COCO, VOC or BDD100K annotations, or images alone.
        observer: receives a summary.

    Raises:
        DataError: the folder has no images, or its annotations have another format.
    """
    files = find_detection_files(folder)
    lists = None if files else find_voc_lists(folder)
    if lists is not None:
        return _describe_voc(folder, *lists, observer)
    bdd = None if files or lists else find_bdd100k(folder)
    if bdd is not None:
        train, val = (
            read_bdd100k(labels=folder / labels, images=folder / images)
            for labels, images in ((bdd.train, bdd.train_images), (bdd.val, bdd.val_images))
        )
        _report(train, val, observer)
        return _build_block("bdd100k", folder, bdd), train
    if not files:
        check_no_labels(folder)
        train, val = (read_folder(folder, which) for which in assembly.SPLITS)
        observer(Note(f"no annotations: the teacher will label {len(train)} training and {len(val)} validation images"))
        return {"format": "folder", "root": str(folder)}, train
    layout = find_layout(folder, files)
    train, val = (
        read_coco(annotations=folder / annotations, images=folder / images)
        for annotations, images in ((layout.train, layout.train_images), (layout.val, layout.val_images))
    )
    _report(train, val, observer)
    return _build_block("coco", folder, layout), train


def _build_block(format: str, folder: Path, layout: Layout) -> dict[str, Any]:
    return {"format": format, "root": str(folder), **{name: str(path) for name, path in vars(layout).items()}}


def _describe_voc(folder: Path, train: list[Path], val: list[Path], observer: Observer) -> tuple[dict[str, Any], Split]:
    """Returns the block of a folder in VOC's layout, and the training split."""
    lists = [[folder / path for path in paths] for paths in (train, val)]
    found = sorted({name for paths in lists for name in read_object_names(paths)})
    classes = None if set(found) <= set(VOC_CLASSES) else found
    train_split, val_split = (read_voc(lists=paths, root=folder, classes=classes) for paths in lists)
    _report(train_split, val_split, observer)
    block: dict[str, Any] = {"format": "voc", "root": str(folder)}
    block |= {"train": [str(path) for path in train], "val": [str(path) for path in val]}
    return block | ({"classes": classes} if classes else {}), train_split


def _report(train: Split, val: Split, observer: Observer) -> None:
    observer(Note(f"{len(train)} training and {len(val)} validation images, classes: {', '.join(train.class_names)}"))
