"""Splits and training batches from a recipe's data block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeGuard

from gdetkd_cli.data.bad_images import BadImageError, BadImages
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.folds import build_fold, hold_out
from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.loader import load_training_batches
from gdetkd_cli.data.readers.bdd100k import read_bdd100k
from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.readers.data_yaml import read_yolo_config
from gdetkd_cli.data.readers.folder import read_folder
from gdetkd_cli.data.readers.voc import read_voc
from gdetkd_cli.data.readers.yolo import read_yolo
from gdetkd_cli.data.split import DataProblem, Split
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Note, Observer, report_every
from gdetkd_cli.errors import DataError
from gdetkd_cli.memory import check_memory
from gdetkd_cli.recipe.schema import (
    Bdd100kData,
    CocoData,
    Data,
    Fold,
    FolderData,
    Recipe,
    SyntheticData,
    VocData,
    YoloData,
)
from gdetkd_cli.structures import Batch

Which = Literal["train", "val"]
Unlabelled = CocoData | YoloData | FolderData  # data whose images the teacher can label
_SAMPLED_SIZES = 1000  # images whose size is read to estimate a batch's memory
SPLITS: tuple[Which, ...] = ("train", "val")


def build_split(
    data: Data,
    which: Which,
    labels: Path | None = None,
    *,
    outlines: bool = False,
    bad: BadImages | None = None,
    problems: list[DataProblem] | None = None,
) -> Split:
    """Builds the ``train`` or ``val`` split.

    Args:
        data: the recipe's block; with a ``fold``, ``val`` is that fold of both splits' images, ``train`` the rest.
        labels: a run's folder of teacher labels.
        outlines: keep the objects' outlines, if the annotations have any.
        bad: collects the images that are left out; None: a new collection, if the recipe leaves images out.
        problems: receives each annotation that is changed or dropped; None: these are only counted.

    Raises:
        DataError: the data cannot be read, or the teacher has not labelled them yet.
    """
    fold = None if isinstance(data, FolderData) else data.fold
    bad = bad or _collect_bad_images(data)
    if fold is not None:
        return _build_fold(data, fold, which, outlines=outlines, bad=bad, problems=problems)
    if isinstance(data, SyntheticData):
        images = data.train_images if which == "train" else data.val_images
        return draw_split(split=which, images=images, size=data.size, seed=data.seed, smallest=data.smallest)
    if needs_labels(data, which):
        if labels is None:
            raise DataError(
                f"the {which} images in {get_image_folder(data)} have no annotations; run `gdetkd distill`, "
                "whose teacher labels them and stores COCO files in the run's folder `labels`"
            )
        return read_coco(annotations=labels / f"{which}.json", images=get_image_folder(data), bad=bad)
    return _read_annotated(data, which, outlines=outlines, bad=bad, problems=problems)


def _read_annotated(
    data: CocoData | YoloData | VocData | Bdd100kData | FolderData,
    which: Which,
    *,
    needs_labels: bool = True,
    outlines: bool = False,
    bad: BadImages | None,
    problems: list[DataProblem] | None = None,
) -> Split:
    """Reads the images and annotations of a split; see ``build_split``."""
    if isinstance(data, CocoData | YoloData | VocData) and data.val is None:
        whole = data.model_copy(update={"val": data.train})
        split = _read_annotated(
            whole, "train", needs_labels=needs_labels, outlines=outlines, bad=bad, problems=problems
        )
        return hold_out(split, which)
    root, classes = data.root, data.classes
    if isinstance(data, YoloData):
        config, paths = read_yolo_config(root / data.names), data.train if which == "train" else data.val
        return read_yolo(
            config=config,
            sources=config.find_sources(which) if isinstance(paths, str) else [root / path for path in paths or ()],
            root=root,
            classes=classes,
            needs_labels=needs_labels,
            outlines=outlines,
            bad=bad,
            problems=problems,
        )
    if isinstance(data, VocData):
        lists = [root / path for path in (data.train if which == "train" else data.val or ())]
        return read_voc(lists=lists, root=root, classes=classes, bad=bad, problems=problems)
    if which == "train":
        assert not isinstance(data, FolderData)
        annotations, images = root / data.train, root / data.train_images
    else:
        assert data.val is not None
        annotations, images = root / data.val, root / data.val_images
    if isinstance(data, Bdd100kData):
        return read_bdd100k(labels=annotations, images=images, classes=classes, bad=bad, problems=problems)
    return read_coco(
        annotations=annotations, images=images, classes=classes, outlines=outlines, bad=bad, problems=problems
    )


def build_all_folds(data: Data) -> Split:
    """Builds a split of the images of both splits, with the ids that they have in each fold.

    Args:
        data: the recipe's block, with a ``fold``.

    Raises:
        DataError: the data cannot be read.
    """
    assert not isinstance(data, FolderData) and data.fold is not None
    return _build_fold(data, data.fold, "all")


def _build_fold(
    data: Data,
    fold: Fold,
    which: Literal["train", "val", "all"],
    *,
    outlines: bool = False,
    bad: BadImages | None = None,
    problems: list[DataProblem] | None = None,
) -> Split:
    whole = data.model_copy(update={"fold": None})
    bad = bad or _collect_bad_images(data)
    train, val = (build_split(whole, part, outlines=outlines, bad=bad, problems=problems) for part in SPLITS)
    return build_fold(train, val, number=fold.number, of=fold.of, which=which)


def _collect_bad_images(data: Data) -> BadImages | None:
    """Returns a collection for the images that cannot be read, or None if such an image is an error."""
    if isinstance(data, SyntheticData) or data.on_bad_sample == "error":
        return None
    return BadImages(data.max_bad_samples)


def report_bad_images(splits: Iterable[Split], observer: Observer) -> None:
    """Makes the observer receive a note about each image that is left out, from now on and so far."""
    for split in splits:
        if split.bad is not None:
            split.bad.report_to(lambda text: observer(Note(text)))


def check_headers(splits: Iterable[Split], observer: Observer) -> None:
    """Reads the header of every image file; reports the progress.

    Raises:
        DataError: an image is missing or unreadable, or has another size than its annotations.
    """
    files = [(split.read, split.bad) for split in splits if isinstance(split.read, ImageFiles)]
    progress = report_every(observer, "checked", sum(len(one.paths) for one, _ in files))
    done = 0
    for one, bad in files:
        for index in range(len(one.paths)):
            try:
                one.check_header(index)
            except BadImageError as error:
                if bad is None:
                    raise
                bad.add(error)
            done += 1
            progress(done)


def needs_labels(data: Data, which: Which) -> TypeGuard[Unlabelled]:
    """Whether the teacher has to label the split."""
    if isinstance(data, FolderData):
        return which == "train" or data.val is None
    return isinstance(data, CocoData | YoloData) and which == "train" and data.labels != "annotations"


def read_split(
    data: Data, which: Which, *, bad: BadImages | None = None, problems: list[DataProblem] | None = None
) -> Split:
    """Reads a split's images, and their annotations if they have any; needs no teacher labels.

    ``bad``, ``problems`` and errors: see ``build_split``.
    """
    if needs_labels(data, which):
        return read_unlabelled_split(data, which, bad=bad, problems=problems)
    return build_split(data, which, bad=bad, problems=problems)


def read_unlabelled_split(
    data: Unlabelled, which: Which, *, bad: BadImages | None = None, problems: list[DataProblem] | None = None
) -> Split:
    """Reads the images for the teacher to label; the split has no classes if it takes the teacher's.

    ``bad``, ``problems`` and errors: see ``build_split``.
    """
    bad = bad or _collect_bad_images(data)
    if isinstance(data, FolderData):
        split = read_folder(get_image_folder(data), "all" if data.val is not None else which, bad=bad)
        return replace(split, class_names=tuple(data.classes or ()))
    return _read_annotated(data, "train", needs_labels=False, bad=bad, problems=problems)


def get_image_folder(data: Unlabelled) -> Path:
    """Returns the folder from which the names of the training images start in the teacher's labels."""
    return data.root if isinstance(data, YoloData) else data.root / data.train_images


def build_batches(
    recipe: Recipe, split: Split, settings: ComputeSettings, *, rank: int, world_size: int, views: bool = False
) -> Callable[[int], Iterator[Batch]]:
    """Returns a function from a start step to the training batches from there to the recipe's last step.

    A step has ``train.accumulate`` batches. Together they hold the images that one larger batch would. ``views`` adds
    each image's ``ImageView``.

    Raises:
        MemoryLimitError: the images of one batch alone exceed the free memory.
    """
    augment, accumulate = recipe.augment, recipe.train.accumulate
    if augment.multi_scale is None and len(split):
        sample = [split.records[i].size for i in range(0, len(split), math.ceil(len(split) / _SAMPLED_SIZES))]
        pixels = sum(map(math.prod, sample)) // len(sample)  # of an average image
        batch = recipe.train.batch_size
        check_memory(f"train.batch_size: {batch} images of {pixels:,} pixels on average", batch * 12 * pixels)
    dataset = DetectionDataset(
        split=split,
        augmentation=build_augmentation(
            flip=augment.flip,
            photometric=augment.photometric,
            multi_scale=augment.multi_scale,
            max_size=augment.max_size,
            scale_jitter=augment.scale_jitter,
        ),
        seed=recipe.seed,
        cache_mb=recipe.runtime.cache_mb,
        copy_paste=augment.copy_paste,
        views=views,
    )

    def batches(start_step: int) -> Iterator[Batch]:
        return load_training_batches(
            dataset=dataset,
            batch_size=recipe.train.batch_size,
            steps=recipe.train.steps * accumulate,
            start_step=start_step * accumulate,
            seed=recipe.seed,
            rank=rank,
            world_size=world_size,
            workers=settings.workers,
            pin_memory=settings.device == "cuda",
        )

    return batches
