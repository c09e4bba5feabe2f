"""Random changes to training images and their boxes.

Shapes: M boxes, H x W pixels before the change, H' x W' after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from gdetkd_cli.structures import check_resize

# (3, H, W) uint8, (M, 4) xyxy pixels, (M,) labels -> the same of the changed image.
Augmentation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def build_augmentation(
    *, flip: float, photometric: bool, multi_scale: Sequence[int] | None, max_size: int
) -> Augmentation:
    """Builds random changes, drawn from torch's global CPU generator; the identity if all are off.

    Args:
        flip: probability of a horizontal flip.
        photometric: jitter brightness, contrast, saturation and hue.
        multi_scale: short sides in pixels to draw from; None keeps the size.
        max_size: longest side in pixels after ``multi_scale``.
    """
    changes: list[Callable[..., object]] = []
    if photometric:
        changes.append(v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25, hue=0.04))
    if flip > 0:
        changes.append(v2.RandomHorizontalFlip(p=flip))
    if multi_scale is not None:
        # Not antialiased, like torchvision's detectors at inference.
        changes.append(v2.RandomShortestSize(min_size=list(multi_scale), max_size=max_size, antialias=False))
    change = partial(_apply, v2.Compose([*changes, v2.ClampBoundingBoxes()])) if changes else _keep
    return change if multi_scale is None else partial(_check_size, change, min(multi_scale), max_size)


def _check_size(
    change: Augmentation, smallest: int, max_size: int, image: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies a change that resizes, unless the image is so long and narrow that no pixel of its short side remains."""
    height, width = image.shape[-2:]
    advice = "raise augment.max_size, or remove the image"
    check_resize((height, width), shortest=smallest, longest=max_size, advice=advice)
    return change(image, boxes, labels)


def _keep(image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return image, boxes, labels


def _apply(change: v2.Transform, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Changes image and boxes together, then drops boxes with a side under 1 pixel."""
    boxed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    new_image, new_boxes = change(tv_tensors.Image(image), boxed)
    corners = new_boxes.as_subclass(Tensor)
    keep = (corners[:, 2:] - corners[:, :2] >= 1).all(dim=1)
    return new_image.as_subclass(Tensor), corners[keep], labels[keep]


def apply_and_watch(
    change: Augmentation, image: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """Applies a change; returns its result, and whether it mirrored the image.

    The left half of the image goes along as one more box, so the random draws are those of ``change`` alone.
    """
    height, width = image.shape[-2:]
    half = boxes.new_tensor([[0.0, 0.0, width / 2, height]])
    image, boxes, labels = change(image, torch.cat([half, boxes]), torch.cat([labels.new_zeros(1), labels]))
    own = labels == 0  # background: no object has this label
    mirrored = bool((boxes[own, 0] > 0).any())
    return (image, boxes[~own], labels[~own]), mirrored
