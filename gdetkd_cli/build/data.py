"""Splits and training batches from a recipe's data block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import assert_never

from gdetkd_cli.data.coco import align_classes, read_coco
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.loader import training_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.data.synthetic import synthetic_split
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.recipe.schema import CocoData, Recipe, SyntheticData
from gdetkd_cli.structures import Batch
from gdetkd_cli.training.device import ComputeSettings


def build_split(data: SyntheticData | CocoData, which: str) -> Split:
    """The ``train`` or ``val`` split."""
    if isinstance(data, SyntheticData):
        images = data.train_images if which == "train" else data.val_images
        return synthetic_split(split=which, images=images, size=data.size, seed=data.seed)
    if isinstance(data, CocoData):
        annotations, images_folder = (
            (data.train, data.train_images) if which == "train" else (data.val, data.val_images)
        )
        return read_coco(annotations=data.root / annotations, images=data.root / images_folder, classes=data.classes)
    assert_never(data)


def relabel(split: Split, detector: Detector) -> Split:
    """The split with its labels counted in the detector's class list."""
    return split if split.class_names == detector.class_names else align_classes(split, detector.class_names)


def build_batches(
    recipe: Recipe, split: Split, settings: ComputeSettings, *, rank: int, world_size: int
) -> Callable[[int], Iterator[Batch]]:
    """A function: start step -> the training batches from there to the recipe's last step."""
    augment = recipe.augment
    dataset = DetectionDataset(
        split=split,
        augmentation=build_augmentation(
            flip=augment.flip,
            photometric=augment.photometric,
            multi_scale=augment.multi_scale,
            max_size=augment.max_size,
        ),
        seed=recipe.seed,
        cache_mb=recipe.runtime.cache_mb,
    )

    def batches(start_step: int) -> Iterator[Batch]:
        return training_batches(
            dataset=dataset,
            batch_size=recipe.train.batch_size,
            steps=recipe.train.steps,
            start_step=start_step,
            seed=recipe.seed,
            rank=rank,
            world_size=world_size,
            workers=settings.workers,
            pin_memory=settings.device == "cuda",
        )

    return batches
