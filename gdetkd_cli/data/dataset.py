"""A split as training examples: decoded, augmented, in floating point."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gdetkd_cli.data.copy_paste import paste_copies
from gdetkd_cli.data.split import Split
from gdetkd_cli.data.transforms import Augmentation
from gdetkd_cli.structures import Target

Key = tuple[int, int]  # (draw, index): which pass over the data it is, and which of its images
Example = tuple[Tensor, Target, int]

_MIB = 2**20


def mix_seed(*numbers: int) -> int:
    """One 64-bit seed from several non-negative numbers, the same on every machine; neighbours give unlike seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class DetectionDataset(Dataset[Example]):
    """The images of a split. An example is a function of (seed, draw, index) and of nothing else.

    Args:
        split: where records and images come from.
        augmentation: random changes; None for none.
        seed: another seed draws other changes; at least 0.
        cache_mb: MiB of decoded images that this process keeps; the first ones read stay.
        copy_paste: probability that an object is pasted once more, before the other changes.
    """

    def __init__(
        self, *, split: Split, augmentation: Augmentation | None, seed: int, cache_mb: int, copy_paste: float = 0.0
    ) -> None:
        self.split = split
        self._augmentation = augmentation
        self._copy_paste = copy_paste
        self._seed = seed
        self._cache: dict[int, Tensor] = {}
        self._cache_bytes_left = cache_mb * _MIB

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Example:
        """One example.

        Args:
            key: (draw, index).

        Returns:
            The image, (3, H, W) float32 RGB in 0..1, its target, and the data set's id of it.
        """
        draw, index = key
        record = self.split.records[index]
        image, boxes, labels = self._image(index), record.boxes, record.labels
        if self._augmentation is not None or self._copy_paste:
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: it would reseed the accelerator as well, which fork_rng would not put back.
                torch.default_generator.manual_seed(mix_seed(self._seed, draw, index))
                if self._copy_paste:
                    outlines = record.outlines
                    image, boxes, labels = paste_copies(image, boxes, labels, outlines, probability=self._copy_paste)
                if self._augmentation is not None:
                    image, boxes, labels = self._augmentation(image, boxes, labels)
        return image.to(torch.float32).div_(255), Target(boxes=boxes, labels=labels), record.image_id

    def _image(self, index: int) -> Tensor:
        """(3, H, W) uint8, from the cache where it is there."""
        if index in self._cache:
            return self._cache[index]
        image = self.split.read(index)
        if image.nbytes <= self._cache_bytes_left:
            self._cache_bytes_left -= image.nbytes
            self._cache[index] = image
        return image
