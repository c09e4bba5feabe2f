"""Augmentation moves boxes together with their pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from gdetkd_cli.data.transforms import Augmentation, build_augmentation
from gdetkd_cli.errors import DataError

BOXES = torch.tensor([[2.0, 1.0, 6.0, 5.0], [10.0, 2.0, 20.0, 10.0]])
LABELS = torch.tensor([3, 1])


def augment(
    *,
    flip: float = 0.0,
    photometric: bool = False,
    multi_scale: list[int] | None = None,
    max_size: int = 1000,
    scale_jitter: float = 0.0,
) -> Augmentation:
    return build_augmentation(
        flip=flip, photometric=photometric, multi_scale=multi_scale, max_size=max_size, scale_jitter=scale_jitter
    )


def noise() -> Tensor:
    """Returns (3, 10, 20) uint8 noise in which the first box is white."""
    image = torch.randint(0, 200, (3, 10, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image[:, 1:5, 2:6] = 255
    return image


def test_identity_without_changes() -> None:
    image = noise()
    same = augment()(image, BOXES, LABELS)

    assert all(a is b for a, b in zip(same, (image, BOXES, LABELS), strict=True))


def test_flip() -> None:
    image, boxes, labels = augment(flip=1.0)(noise(), BOXES, LABELS)

    assert torch.equal(image, noise().flip(-1))
    assert boxes.tolist() == [[14, 1, 18, 5], [0, 2, 10, 10]]
    assert labels.tolist() == [3, 1]
    assert image[:, 1:5, 14:18].tolist() == [[[255] * 4] * 4] * 3  # the box is still on its pixels


def test_flip_probability() -> None:
    torch.manual_seed(0)
    change = augment(flip=0.25)
    flipped = sum(change(noise(), BOXES, LABELS)[1][0, 0].item() == 14 for _ in range(400))

    assert 70 <= flipped <= 130  # 100 +- 3.5 standard deviations


def test_plain_tensors_come_out() -> None:
    outputs = augment(flip=1.0, photometric=True, multi_scale=[20])(noise(), BOXES, LABELS)

    assert [type(output) for output in outputs] == [Tensor] * 3
    assert [output.dtype for output in outputs] == [torch.uint8, torch.float32, torch.int64]


def test_photometric_changes_pixels_alone() -> None:
    torch.manual_seed(0)
    image, boxes, _ = augment(photometric=True)(noise(), BOXES, LABELS)

    assert image.shape == (3, 10, 20)
    assert not torch.equal(image, noise())
    assert torch.equal(boxes, BOXES)


def test_multi_scale_draws_every_size() -> None:
    torch.manual_seed(0)
    change = augment(multi_scale=[20, 30])
    results = [change(noise(), BOXES, LABELS) for _ in range(20)]

    assert {(tuple(image.shape), tuple(boxes[0].tolist())) for image, boxes, _ in results} == {
        ((3, 20, 40), (4.0, 2.0, 12.0, 10.0)),
        ((3, 30, 60), (6.0, 3.0, 18.0, 15.0)),
    }


def test_multi_scale_keeps_to_max_size() -> None:
    image, boxes, _ = augment(multi_scale=[20], max_size=30)(noise(), BOXES, LABELS)

    assert image.shape == (3, 15, 30)
    assert boxes[0].tolist() == [3, 1.5, 9, 7.5]


@pytest.mark.parametrize("size", [5, 20])
def test_multi_scale_resizes_as_detectors_do(size: int) -> None:
    """Torchvision's resize gives the same pixels, down and up, except for rounding once per axis."""
    image, _, _ = augment(multi_scale=[size])(noise(), BOXES, LABELS)
    own = GeneralizedRCNNTransform(size, 1000, image_mean=[0.0] * 3, image_std=[1.0] * 3, size_divisible=1)

    torch.testing.assert_close(image.float(), own([noise().float()])[0].tensors[0], atol=1.01, rtol=0)


def find_white(image: Tensor) -> Tensor:
    """The box around an image's white pixels."""
    places = (image[0] > 200).nonzero()
    low, high = places.min(dim=0).values, places.max(dim=0).values + 1
    return torch.cat([low.flip(0), high.flip(0)]).float()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_scale_jitter_keeps_the_size_and_moves_boxes_with_their_pixels(flip: float) -> None:
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:40, 30:60] = 255
    change, widths, padded = augment(flip=flip, scale_jitter=1.0), [], 0
    for seed in range(60):
        torch.manual_seed(seed)
        changed, boxes, labels = change(image, torch.tensor([[30.0, 20.0, 60.0, 40.0]]), torch.tensor([7]))
        assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)
        padded += bool((changed == 114).all(dim=0).any())
        if len(boxes):
            assert labels.tolist() == [7]
            torch.testing.assert_close(boxes[0], find_white(changed), atol=1.0, rtol=0)
            widths.append(float(boxes[0, 2] - boxes[0, 0]))
    assert len(widths) > 50
    assert 10 < padded < 30  # a third of the scales lie below 1
    assert min(widths) < 20 and max(widths) > 50


def test_scale_jitter_drops_objects_that_are_mostly_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdetkd_cli.data.transforms._SCALES", (2.0, 2.0))
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 45:, 60:] = 255
    kept = 0
    for seed in range(60):
        torch.manual_seed(seed)
        changed, boxes, _ = augment(scale_jitter=1.0)(image, torch.tensor([[60.0, 45, 80, 60]]), torch.tensor([1]))
        share = int((changed[0] > 127).sum()) / (4 * 20 * 15)
        assert len(boxes) == (share >= 0.25) or abs(share - 0.25) < 0.04  # give or take the blurred edge
        kept += len(boxes)
    assert 0 < kept < 60


def test_scale_jitter_probability() -> None:
    torch.manual_seed(0)
    change = augment(scale_jitter=0.25)
    unchanged = sum(torch.equal(change(noise(), BOXES, LABELS)[0], noise()) for _ in range(400))

    assert 270 <= unchanged <= 330


def test_boxes_under_a_pixel_are_dropped() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.9, 8.0], [0.0, 0.0, 8.0, 2.0], [0.0, 0.0, 8.0, 1.9]])
    image, kept, labels = augment(multi_scale=[5])(noise(), boxes, torch.tensor([1, 2, 3]))

    assert image.shape == (3, 5, 10)
    assert kept.tolist() == [[0, 0, 4, 1]]
    assert labels.tolist() == [2]


def test_boxes_are_clamped_to_the_image() -> None:
    boxes = torch.tensor([[-3.0, 2.0, 5.0, 12.0]])
    _, clamped, _ = augment(flip=1.0)(noise(), boxes, torch.tensor([1]))

    assert clamped.tolist() == [[15, 2, 20, 10]]


def test_no_boxes() -> None:
    _, boxes, labels = augment(flip=1.0, multi_scale=[20])(noise(), BOXES[:0], LABELS[:0])

    assert (boxes.shape, labels.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("size", [(8, 10_000), (10_000, 8), (2, 2)])
def test_an_image_of_which_nothing_would_be_left_is_refused(size: tuple[int, int]) -> None:
    change = augment(multi_scale=[1, 800], max_size=1000)
    with pytest.raises(DataError, match=rf"an image of {size[1]} x {size[0]} pixels is too long and narrow"):
        change(torch.zeros(3, *size, dtype=torch.uint8), BOXES, LABELS)
