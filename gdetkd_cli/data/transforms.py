"""Random changes to training images and their boxes.

Shapes: M boxes, H x W pixels before the change, H' x W' after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2

from gdetkd_cli.structures import check_resize

# (3, H, W) uint8, (M, 4) xyxy pixels, (M,) labels -> the same of the changed image.
Augmentation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_SCALES = (0.5, 2.0)  # of large-scale jitter
_LEAST_VISIBLE = 0.25  # an object is dropped if the new frame holds a smaller share of its box
_PADDING = 114  # value of all three colours, a medium grey


def build_augmentation(
    *,
    flip: float,
    photometric: bool,
    multi_scale: Sequence[int] | None,
    max_size: int,
    scale_jitter: float = 0.0,
) -> Augmentation:
    """Builds random changes, drawn from torch's global CPU generator; the identity if all are off.

    Args:
        flip: probability of a horizontal flip.
        photometric: jitter brightness, contrast, saturation and hue.
        multi_scale: short sides in pixels to draw from; None keeps the size.
        max_size: longest side in pixels after ``multi_scale``.
        scale_jitter: probability of large-scale jitter, before the other changes.
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
    if scale_jitter > 0:
        change = partial(_jitter_scale, scale_jitter, change)
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


def _jitter_scale(
    probability: float, then: Augmentation, image: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Shows the image at another scale in a frame of its own size, with some probability, and changes it further.

    Large-scale jitter of Ghiasi et al. (CVPR 2021), on the image's own size: a larger image is cropped, a smaller one
    is padded, both at a random place.
    """
    if torch.rand(()).item() < probability:
        height, width = image.shape[-2:]
        scale = torch.empty(()).uniform_(*_SCALES).item()
        size = [max(round(scale * side), 1) for side in (height, width)]
        frame = v2.RandomCrop((height, width), pad_if_needed=True, fill=_PADDING)
        areas = box_area(boxes) * (size[0] * size[1] / (height * width))
        image, boxes = _change(v2.Compose([v2.Resize(size, antialias=True), frame]), image, boxes)
        visible = box_area(boxes) >= _LEAST_VISIBLE * areas
        boxes, labels = boxes[visible], labels[visible]
    return then(image, boxes, labels)


def _apply(change: v2.Transform, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Changes image and boxes together, then drops boxes with a side under 1 pixel."""
    image, boxes = _change(change, image, boxes)
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    return image, boxes[keep], labels[keep]


def _change(change: v2.Transform, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxed = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    new_image, new_boxes = change(tv_tensors.Image(image), boxed)
    return new_image.as_subclass(Tensor), new_boxes.as_subclass(Tensor)


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
