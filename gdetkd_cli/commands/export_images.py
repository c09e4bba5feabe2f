"""The images on which ``export`` compares a file with its detector, and those that calibrate 8-bit numbers.

Shapes: images (3, H, W) in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from math import ceil
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from gdetkd_cli import assembly
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.events import Note, Observer
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DataError, RecipeError
from gdetkd_cli.export.reduced import CalibrationImages
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import Data, SyntheticData

# Factors (height, width) by which parity images are stretched, to find exports that work for one size only.
_STRETCHES = ((1.0, 1.0), (0.8, 1.25), (1.3, 0.7), (0.53, 0.53), (1.7, 1.1), (0.67, 1.9))
_LONGEST, _SHORTEST = 640, 32  # pixels of a parity image's sides
_CALIBRATION_IMAGES = 100
_BATCHES = 3  # of different sizes, to compare a batched file
_SHIFT = 17  # pixels; a batch of more images than there are has them moved


def read_parity_images(source: Path, observer: Observer) -> list[Tensor]:
    """Reads images of different sizes: validation images of the run, else synthetic scenes."""
    recipe = source.parent / "recipe.yaml"
    if recipe.exists():
        try:
            return _read_stretched(load_recipe(recipe).data)
        except (DataError, RecipeError) as error:
            observer(Note(f"comparing on synthetic scenes, because the run's data cannot be read: {error}"))
    return _read_stretched(SyntheticData())


def arrange_batches(images: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Returns images for a batched file: different ones of one size for each batch, and batches of different sizes.

    Args:
        images: at least one, of any sizes.
        batch: images per batch; 0: any number, so the batches have one, two and three.
    """
    arranged = []
    for first in range(_BATCHES):
        size = images[first % len(images)].shape[-2:]
        for place in range(first, first + (batch or first + 1)):
            image = _resize(images[place % len(images)], list(size))
            arranged.append(image.roll(_SHIFT * ((place - first) // len(images)), dims=2))
    return arranged


def find_calibration(source: Path, observer: Observer) -> CalibrationImages:
    """Finds training images of the detector's run, evenly chosen; else synthetic scenes."""
    recipe = source.parent / "recipe.yaml"
    data: Data = SyntheticData(train_images=_CALIBRATION_IMAGES)
    if recipe.exists():
        data = load_recipe(recipe).data
    else:
        observer(Note(f"warning: {source} has no recipe.yaml with its data beside it, so synthetic scenes are used"))
    split = assembly.build_split(data, "train", RunFolder(source.parent).find_labels())
    assembly.report_bad_images([split], observer)
    chosen = range(0, len(split), ceil(len(split) / _CALIBRATION_IMAGES))
    return CalibrationImages([split.records[index].size for index in chosen], lambda i: _read(split, chosen[i]))


def _read(split: Split, index: int) -> Tensor | None:
    image = split.read_if_whole(index)
    return None if image is None else image.float() / 255


def _read_stretched(data: Data) -> list[Tensor]:
    if isinstance(data, SyntheticData):  # building the split draws every scene, so draw only a few
        data = data.model_copy(update={"val_images": min(data.val_images, len(_STRETCHES)), "fold": None})
    split = assembly.read_split(data, "val")
    read = (image for index in range(len(split)) if (image := _read(split, index)) is not None)
    images = list(islice(read, len(_STRETCHES)))
    if not images:
        raise DataError(f"no image of {split.name} can be read")
    return [_stretch(image, by) for image, by in zip(cycle(images), _STRETCHES, strict=False)]


def _stretch(image: Tensor, by: tuple[float, float]) -> Tensor:
    """Scales an image by (height, width) factors, within the limits of a parity image's sides."""
    height, width = (side * factor for side, factor in zip(image.shape[-2:], by, strict=True))
    shrink = min(1.0, _LONGEST / max(height, width))
    return _resize(image, [max(_SHORTEST, round(side * shrink)) for side in (height, width)])


def _resize(image: Tensor, size: list[int]) -> Tensor:
    return functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
