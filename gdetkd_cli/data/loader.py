"""Batches by step.

The batch of a step depends only on the seed and the step, not on where the run started, on the number of loader
processes, or on other random numbers.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset

from gdetkd_cli.data.bad_images import BadImageError
from gdetkd_cli.data.dataset import DetectionDataset, Example, Key, mix_seed
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError, LoaderError, get_first_line
from gdetkd_cli.structures import Batch, group_by_size


def load_training_batches(
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
    """Yields the batches of steps ``start_step`` to ``steps - 1``, one for each step.

    Each pass over the data is a new permutation of the images. A batch may span two passes. The next image takes the
    place of one that is left out (``Split.bad``).

    Args:
        batch_size: images per step and process.
        steps: steps of the whole run.
        seed: of the order of the images; at least 0.
        rank: of this process; each process gets its own share of a step's images.
        workers: number of loader processes; they and their caches live as long as the iterator.
        pin_memory: yield page-locked tensors, which copy to a CUDA device without waiting.

    Raises:
        DataError: the data set is empty, or an image cannot be read.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.split.name} has no images to train on; give a split with at least one")
    keys = _list_training_keys(
        images=len(dataset),
        batch_size=batch_size,
        steps=range(start_step, steps),
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    return _load(dataset, keys, workers=workers, pin_memory=pin_memory, replace=True)


def load_validation_batches(*, split: Split, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yields every image of the split once over all processes, unchanged. Shares differ by at most one image.

    Images that are left out (``Split.bad``) are in no batch.

    The images of a batch have one size, because padding to a larger neighbour would change detections at the border,
    and with them the AP.

    Args:
        batch_size: images per batch; the last batch of a size may have fewer.

    Raises:
        DataError: an image cannot be read.
    """
    dataset = DetectionDataset(split=split, augmentation=None, seed=0, cache_mb=0)
    own = range(rank, len(split), world_size)
    groups = group_by_size((split.records[index].size for index in own), batch_size)
    keys = ([(0, own[place]) for place in places] for places in groups)
    return _load(dataset, keys, workers=0, pin_memory=False, replace=False)


def _list_training_keys(
    *, images: int, batch_size: int, steps: range, seed: int, rank: int, world_size: int
) -> Iterator[list[Key]]:
    """Yields the keys of one process's batch for each step."""

    @lru_cache(maxsize=1)
    def order(draw: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(seed, draw))
        return torch.randperm(images, generator=generator).tolist()

    for step in steps:
        first = (step * world_size + rank) * batch_size
        places = (divmod(place, images) for place in range(first, first + batch_size))
        yield [(draw, order(draw)[position]) for draw, position in places]


_Loaded = tuple[Batch | None, list[BadImageError]] | DataError


class _BatchDataset(Dataset[_Loaded]):
    """Whole batches by their keys. Returns errors, because torch adds a traceback to errors of a loader process.

    Args:
        replace: whether the next readable image takes the place of an image that is left out.
    """

    def __init__(self, dataset: DetectionDataset, *, replace: bool) -> None:
        self._dataset = dataset
        self._replace = replace

    def __getitem__(self, keys: list[Key]) -> _Loaded:
        bad: list[BadImageError] = []
        try:
            examples = [example for key in keys if (example := self._read(key, bad)) is not None]
        except DataError as error:
            return error
        if not examples:
            return None, bad
        images, targets, image_ids, views = zip(*examples, strict=True)
        return Batch(
            images=list(images),
            targets=list(targets),
            image_ids=torch.tensor(image_ids),
            views=tuple(view for view in views if view is not None),
        ), bad

    def _read(self, key: Key, bad: list[BadImageError]) -> Example | None:
        """Reads an example and adds images that are left out to ``bad``."""
        allowed = self._dataset.split.bad
        for offset in range(1 + allowed.most if allowed and self._replace else 1):
            try:
                return self._dataset[key[0], (key[1] + offset) % len(self._dataset)]
            except BadImageError as error:
                if allowed is None:
                    raise
                bad.append(error)
        return None


def _load(
    dataset: DetectionDataset, keys: Iterable[list[Key]], *, workers: int, pin_memory: bool, replace: bool
) -> Iterator[Batch]:
    """Yields batches in the order of ``keys``, read ahead; ``replace``: see ``_BatchDataset``."""
    loader = DataLoader(
        _BatchDataset(dataset, replace=replace),
        sampler=keys,  # each "sample" is already a batch, hence:
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # the loader draws its processes' seed here instead of from the main generator
    )
    for loaded in _read_on(loader):
        if isinstance(loaded, DataError):
            raise loaded
        batch, bad = loaded
        for error in bad:
            assert dataset.split.bad is not None
            dataset.split.bad.add(error)
        if batch is not None:
            yield batch
        elif replace:
            raise DataError(f"no image of {dataset.split.name} can be read; give other data")


def _read_on(loader: DataLoader[_Loaded]) -> Iterator[_Loaded]:
    """Yields what the loader yields; raises a LoaderError that names a process of it that ended."""
    child_ended = getattr(signal, "SIGCHLD", None)
    before = None if child_ended is None else signal.getsignal(child_ended)
    found = iter(loader)
    if child_ended is not None and threading.current_thread() is threading.main_thread():
        signal.signal(child_ended, before)  # torch's own handler raises in the middle of any other work
    try:
        yield from found
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise LoaderError(
            f"a data loader process was ended from outside ({get_first_line(error)}); the system does so if memory "
            "runs out: lower runtime.workers, runtime.cache_mb or train.batch_size, then run the command again"
        ) from error


def _ignore_stop_signals(worker: int) -> None:
    """Schedulers signal every process of a job; a loader process must live until the main one has taken its step."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
