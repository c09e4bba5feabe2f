"""Training examples of a split: decoded, augmented, in floating point."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gdetkd_cli.data.copy_paste import paste_copies
from gdetkd_cli.data.split import Split
from gdetkd_cli.data.transforms import Augmentation, apply_and_watch
from gdetkd_cli.structures import ImageView, Target, name_view

Key = tuple[int, int]  # (draw, index): number of the pass over the data, index of the image
Example = tuple[Tensor, Target, int, ImageView | None]

_MIB = 2**20


def mix_seed(*numbers: int) -> int:
    """Mixes non-negative numbers into a 64-bit seed, the same on every machine; similar numbers give unlike seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class DetectionDataset(Dataset[Example]):
    """The images of a split. An example depends only on (seed, draw, index).

    Args:
        split: source of records and images.
        seed: of the random changes; at least 0.
        cache_mb: MiB of decoded images that each process keeps; the first images read stay.
        copy_paste: probability of pasting a copy of an object, before the other changes.
        views: add each image's ``ImageView``; not together with ``copy_paste`` or large-scale jitter.
    """

    def __init__(
        self,
        *,
        split: Split,
        augmentation: Augmentation | None,
        seed: int,
        cache_mb: int,
        copy_paste: float = 0.0,
        views: bool = False,
    ) -> None:
        self.split = split
        self._augmentation = augmentation
        self._copy_paste = copy_paste
        self._seed = seed
        self._views = views
        self._cache: dict[int, Tensor] = {}
        self._cache_bytes_left = cache_mb * _MIB

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Example:
        """Returns the image (3, H, W) float32 RGB in 0..1, its target, its id in the data set, and its view."""
        draw, index = key
        record = self.split.records[index]
        image, boxes, labels = self._read_image(index), record.boxes, record.labels
        view = image
        if self._augmentation is not None or self._copy_paste:
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: it also reseeds the accelerator, which fork_rng does not restore.
                torch.default_generator.manual_seed(mix_seed(self._seed, draw, index))
                if self._copy_paste:
                    outlines = record.outlines
                    image, boxes, labels = paste_copies(image, boxes, labels, outlines, probability=self._copy_paste)
                if self._augmentation is not None and self._views:
                    (image, boxes, labels), mirrored = apply_and_watch(self._augmentation, image, boxes, labels)
                    view = view.flip(-1) if mirrored else view
                elif self._augmentation is not None:
                    image, boxes, labels = self._augmentation(image, boxes, labels)
        target = Target(boxes=boxes, labels=labels)
        return image.to(torch.float32).div_(255), target, record.image_id, self._build_view(view, image)

    def _build_view(self, view: Tensor, image: Tensor) -> ImageView | None:
        """The view of an image; its pixels only if the image's own differ."""
        if not self._views:
            return None
        return ImageView(name_view(view), None if torch.equal(view, image) else view)

    def _read_image(self, index: int) -> Tensor:
        """Returns (3, H, W) uint8, from the cache if possible."""
        if index in self._cache:
            return self._cache[index]
        image = self.split.read(index)
        if image.nbytes <= self._cache_bytes_left:
            self._cache_bytes_left -= image.nbytes
            self._cache[index] = image
        return image
