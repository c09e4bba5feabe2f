"""Examples and batches depend only on the seed and the step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdetkd_cli.data.dataset import DetectionDataset, mix_seed
from gdetkd_cli.data.loader import load_training_batches, load_validation_batches
from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.errors import DataError
from gdetkd_cli.structures import Batch, name_view


class Noise:
    """Reads noise images of different sizes and records the indices."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __call__(self, index: int) -> Tensor:
        self.reads.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 16, 20 + index), generator=generator, dtype=torch.uint8)


def make_split(images: int, read: Noise | None = None) -> Split:
    records = [
        Record(
            image_id=100 + index,
            size=(16, 20 + index),
            boxes=torch.tensor([[1.0, 2.0, 9.0, 11.0]])[: 0 if index == 1 else 1],
            labels=torch.tensor([1])[: 0 if index == 1 else 1],
        )
        for index in range(images)
    ]
    return Split(name="noise", class_names=("thing",), records=records, read=read or Noise())


def make_even_split(images: int) -> Split:
    """Returns a split of images of one size, which may share a batch."""
    split = make_split(images)
    records = [replace(record, size=(16, 20)) for record in split.records]
    return replace(split, records=records, read=lambda index: split.read(index)[:, :, :20])


def make_dataset(images: int = 5, *, augmented: bool = True, seed: int = 0, cache_mb: int = 0) -> DetectionDataset:
    change = build_augmentation(flip=0.5, photometric=True, multi_scale=[16, 24, 32], max_size=100)
    return DetectionDataset(
        split=make_split(images), augmentation=change if augmented else None, seed=seed, cache_mb=cache_mb
    )


def ids(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.image_ids.tolist() for batch in batches]


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    """Compares bit by bit."""
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.image_ids, b.image_ids)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for x, y in zip(a.targets, b.targets, strict=True):
            assert torch.equal(x.boxes, y.boxes)
            assert torch.equal(x.labels, y.labels)


def test_unaugmented_example() -> None:
    dataset = make_dataset(augmented=False)
    image, target, image_id, view = dataset[0, 2]

    assert (image.shape, image.dtype) == ((3, 16, 22), torch.float32)
    assert torch.equal(image, Noise()(2).float() / 255)
    assert target.boxes.tolist() == [[1, 2, 9, 11]]
    assert target.labels.tolist() == [1]
    assert image_id == 102
    assert view is None
    assert len(dataset) == 5


def test_example_is_a_function_of_seed_draw_and_index() -> None:
    def image(seed: int, draw: int) -> Tensor:
        return make_dataset(seed=seed)[draw, 0][0]

    first = image(0, 0)
    torch.rand(3)  # other random numbers change nothing
    random.seed(9)
    assert torch.equal(image(0, 0), first)
    assert not torch.equal(image(0, 1), first)
    assert not torch.equal(image(1, 0), first)


def test_augmentation_leaves_the_main_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)

    torch.manual_seed(5)
    assert len(list(load_training_batches(dataset=make_dataset(), batch_size=2, steps=3, seed=0))) == 3
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("photometric", "multi_scale"), [(False, None), (True, None), (False, [24, 32]), (True, [8])])
def test_views_name_the_image_and_change_nothing_else(photometric: bool, multi_scale: list[int] | None) -> None:
    change = build_augmentation(flip=0.5, photometric=photometric, multi_scale=multi_scale, max_size=100)

    def load(views: bool) -> list[Batch]:
        split = make_split(5)
        dataset = DetectionDataset(split=split, augmentation=change, seed=3, cache_mb=0, views=views)
        return list(load_training_batches(dataset=dataset, batch_size=2, steps=10, seed=1))

    plain, viewed = load(False), load(True)
    assert_same(plain, viewed)
    assert all(batch.views == () for batch in plain)
    mirrored = 0
    for batch in viewed:
        for image, image_id, view in zip(batch.images, batch.image_ids.tolist(), batch.views, strict=True):
            stored = Noise()(image_id - 100)
            known = {name_view(stored): stored, name_view(stored.flip(-1)): stored.flip(-1)}
            seen = known[view.name]  # one of the two views of this image
            mirrored += seen is not stored
            if photometric or multi_scale:
                assert view.pixels is not None
                assert torch.equal(view.pixels, seen)
            else:
                assert view.pixels is None
                assert torch.equal(image, seen.float() / 255)
    assert 4 <= mirrored <= 16  # of 20 with a probability of 0.5


def test_the_size_is_part_of_a_view() -> None:
    assert name_view(torch.zeros(3, 4, 6, dtype=torch.uint8)) != name_view(torch.zeros(3, 6, 4, dtype=torch.uint8))


def test_mixed_seeds_differ() -> None:
    assert mix_seed(1, 2, 3) == mix_seed(1, 2, 3)
    assert len({mix_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125


def test_cache_is_bounded() -> None:
    noise = Noise()
    half_a_mib = torch.zeros(1, 2**10, 2**9, dtype=torch.uint8)
    split = make_split(3)
    split = Split(
        name="big",
        class_names=split.class_names,
        records=split.records,
        read=lambda index: half_a_mib + (0 * noise(index).sum()).to(torch.uint8),
    )
    dataset = DetectionDataset(split=split, augmentation=None, seed=0, cache_mb=1)
    for _ in range(2):
        for index in range(3):
            assert dataset[0, index][0].shape == (1, 2**10, 2**9)

    assert noise.reads == [0, 1, 2, 2]  # the first two fill the cache


def test_cached_images_do_not_change() -> None:
    dataset = make_dataset(augmented=False, cache_mb=1)
    dataset[0, 0][0].zero_()

    assert torch.equal(dataset[0, 0][0], Noise()(0).float() / 255)


def test_every_pass_takes_every_image_once() -> None:
    batches = ids(load_training_batches(dataset=make_dataset(6), batch_size=2, steps=9, seed=0))
    passes = [[*batches[start], *batches[start + 1], *batches[start + 2]] for start in (0, 3, 6)]

    assert [sorted(ids_) for ids_ in passes] == [list(range(100, 106))] * 3
    assert len({tuple(ids_) for ids_ in passes}) == 3
    assert ids(load_training_batches(dataset=make_dataset(6), batch_size=2, steps=9, seed=1)) != batches


def test_batches_hold_lists_of_unlike_images() -> None:
    batch = next(load_training_batches(dataset=make_dataset(augmented=False), batch_size=5, steps=1, seed=0))

    assert len(batch) == 5
    assert batch.image_ids.dtype == torch.int64
    widths = [image.shape[2] for image in batch.images]
    assert widths == [20 + image_id - 100 for image_id in batch.image_ids.tolist()]
    empty = batch.image_ids.tolist().index(101)
    assert [target.boxes.shape for target in batch.targets] == [(0 if i == empty else 1, 4) for i in range(5)]


def test_batches_larger_than_the_data() -> None:
    (batch,) = ids(load_training_batches(dataset=make_dataset(2), batch_size=5, steps=1, seed=0))

    assert sorted(batch[:2]) == sorted(batch[2:4]) == [100, 101]


@pytest.mark.parametrize("start_step", [0, 3, 7, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_gets_the_same_batches(start_step: int, workers: int) -> None:
    whole = list(load_training_batches(dataset=make_dataset(), batch_size=2, steps=8, seed=3))
    rest = load_training_batches(
        dataset=make_dataset(), batch_size=2, steps=8, start_step=start_step, seed=3, workers=workers
    )

    assert_same(whole[start_step:], rest)


def test_augmentation_differs_between_passes() -> None:
    first, second = load_training_batches(dataset=make_dataset(1), batch_size=1, steps=2, seed=0)

    assert not torch.equal(first.images[0], second.images[0])


def test_processes_share_the_global_batch() -> None:
    def shares(rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
        return load_training_batches(
            dataset=make_dataset(), batch_size=batch_size, steps=4, seed=0, rank=rank, world_size=world_size
        )

    both = [
        Batch(
            images=a.images + b.images,
            targets=a.targets + b.targets,
            image_ids=torch.cat((a.image_ids, b.image_ids)),
        )
        for a, b in zip(shares(0, 2, 2), shares(1, 2, 2), strict=True)
    ]
    assert_same(shares(0, 1, 4), both)


def test_no_images() -> None:
    with pytest.raises(DataError, match="noise has no images"):
        load_training_batches(dataset=make_dataset(0), batch_size=1, steps=1, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_sentence(workers: int) -> None:
    """Also in a loader process, to whose errors torch adds a traceback."""

    def refuse(index: int) -> Tensor:
        raise DataError("the image a.png cannot be decoded")

    dataset = DetectionDataset(split=replace(make_split(1), read=refuse), augmentation=None, seed=0, cache_mb=0)
    with pytest.raises(DataError) as caught:
        next(load_training_batches(dataset=dataset, batch_size=1, steps=1, seed=0, workers=workers))
    assert str(caught.value) == "the image a.png cannot be decoded"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pinned_batches() -> None:
    batch = next(load_training_batches(dataset=make_dataset(), batch_size=2, steps=1, seed=0, pin_memory=True))

    assert all(image.is_pinned() for image in batch.images)
    assert batch.image_ids.is_pinned()


def test_validation_is_in_order_and_unchanged() -> None:
    batches = list(load_validation_batches(split=make_even_split(5), batch_size=2))

    assert ids(batches) == [[100, 101], [102, 103], [104]]
    assert torch.equal(batches[1].images[0], Noise()(2)[:, :, :20].float() / 255)
    assert batches[0].targets[1].boxes.shape == (0, 4)


def test_validation_batches_hold_images_of_one_size() -> None:
    split = make_even_split(5)
    tall = [index in (1, 4) for index in range(5)]
    records = [replace(record, size=(12 if t else 16, 20)) for record, t in zip(split.records, tall, strict=True)]
    mixed = replace(split, records=records, read=lambda index: split.read(index)[:, : 12 if tall[index] else 16])
    batches = list(load_validation_batches(split=mixed, batch_size=2))

    assert [[tuple(image.shape[1:]) for image in batch.images] for batch in batches] == [
        [(16, 20), (16, 20)],
        [(16, 20)],
        [(12, 20), (12, 20)],
    ]
    assert ids(batches) == [[100, 102], [103], [101, 104]]


def test_validation_is_shared_without_repetition() -> None:
    shares = [
        ids(load_validation_batches(split=make_even_split(5), batch_size=2, rank=rank, world_size=3))
        for rank in range(3)
    ]

    assert shares == [[[100, 103]], [[101, 104]], [[102]]]


def test_validation_with_fewer_images_than_processes() -> None:
    assert ids(load_validation_batches(split=make_even_split(1), batch_size=2, rank=1, world_size=2)) == []
