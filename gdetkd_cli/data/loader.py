"""Batches by step.

What the batch of a step is depends on the seed and the step alone: not on where the run started, how many loader
processes there are, or what else has drawn random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset

from gdetkd_cli.data.dataset import DetectionDataset, Key, mix_seed
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.structures import Batch


def training_batches(
    *,
    dataset: DetectionDataset,
    batch_size: int,
    steps: int,
    start_step: int = 0,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of steps ``start_step`` to ``steps - 1``, one iterator for the whole run.

    The images come in an endless row of permutations, one per pass over the data; a batch may reach from one
    pass into the next.

    Args:
        dataset: training examples.
        batch_size: images per step and process.
        steps: steps of the whole run.
        start_step: steps that are done already.
        seed: orders the images; at least 0.
        rank: which of ``world_size`` processes asks; each gets its own share of a step's images.
        world_size: training processes.
        workers: loader processes; they live as long as the iterator, and so do their caches.
        pin_memory: hand out page-locked tensors, which copy to a CUDA device without waiting.

    Raises:
        DataError: the data set is empty, or a image cannot be read.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.split.name} has no images to train on: give a split with at least one.")
    keys = _training_keys(
        images=len(dataset),
        batch_size=batch_size,
        steps=range(start_step, steps),
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return _load(dataset, keys, workers=workers, pin_memory=pin_memory)


def validation_batches(
    *, split: Split, batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every image of the split once over all processes, unchanged. Shares differ by one image at most.

    The images of a batch have one size: padding to a larger neighbour would change what is detected at the border, and
    the AP with it.

    Args:
        split: what to evaluate on.
        batch_size: images per batch; the last one of a size may have fewer.
        rank: which of ``world_size`` processes asks.
        world_size: evaluating processes.
        workers: loader processes.

    Raises:
        DataError: a image cannot be read.
    """
    dataset = DetectionDataset(split=split, augmentation=None, seed=0, cache_mb=0)
    by_size: dict[tuple[int, int], list[Key]] = {}
    for index in range(rank, len(split), world_size):
        by_size.setdefault(split.records[index].size, []).append((0, index))
    keys = (
        share[first : first + batch_size] for share in by_size.values() for first in range(0, len(share), batch_size)
    )
    return _load(dataset, keys, workers=workers, pin_memory=False)


def _training_keys(
    *, images: int, batch_size: int, steps: range, seed: int, rank: int, world_size: int
) -> Iterator[list[Key]]:
    """The keys of one process's batch, step by step."""

    @lru_cache(maxsize=1)
    def order(draw: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(seed, draw))
        return torch.randperm(images, generator=generator).tolist()

    for step in steps:
        first = (step * world_size + rank) * batch_size
        places = (divmod(place, images) for place in range(first, first + batch_size))
        yield [(draw, order(draw)[position]) for draw, position in places]


class _BatchDataset(Dataset[Batch | DataError]):
    """Whole batches by their keys. Errors are handed over, not raised: a loader process would add its traceback."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, keys: list[Key]) -> Batch | DataError:
        try:
            images, targets, image_ids = zip(*(self._dataset[key] for key in keys), strict=True)
        except DataError as error:
            return error
        return Batch(images=list(images), targets=list(targets), image_ids=torch.tensor(image_ids))


def _load(dataset: DetectionDataset, keys: Iterable[list[Key]], *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Reads batches ahead, in the order of ``keys``."""
    loader = DataLoader(
        _BatchDataset(dataset),
        sampler=keys,  # each "sample" is a batch already, hence:
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader draws a seed for its processes: not from the main generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
