"""How images are prepared for a model, and the ways of calling a model with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

_GREY = 0.5  # fills the rest of a fixed size


@dataclass(frozen=True)
class ModelInput:
    """How images are prepared for a model.

    Attributes:
        scale: factor of the values in 0..1 (255 for models that take 0..255).
        mean, std: subtracted and divided by after scaling, per channel, in the model's channel order.
        fit: (height, width) of a model with a fixed input size: images are resized to fit in, and padded at the right
            and the bottom.
        bgr: the model takes blue first, as OpenCV reads images.
    """

    scale: float = 1.0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    fit: tuple[int, int] | None = None
    bgr: bool = False

    def prepare(self, image: Tensor) -> Tensor:
        """Converts an image (3, H, W) in 0..1 to the model's input."""
        if self.fit is not None:
            image = _fit(image, self.fit)
        image = (image.flip(0) if self.bgr else image) * self.scale
        if self.mean is not None:
            image = image - image.new_tensor(self.mean)[:, None, None]
        if self.std is not None:
            image = image / image.new_tensor(self.std)[:, None, None]
        return image

    def to_image(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Converts boxes (M, 4) xyxy from pixels of the model's input to pixels of the image of ``size``, clipped."""
        if self.fit is not None:
            inner = _compute_inner_size(size, self.fit)
            boxes = boxes * boxes.new_tensor([size[1] / inner[1], size[0] / inner[0]]).repeat(2)
        return boxes.clamp(min=0).minimum(boxes.new_tensor([size[1], size[0]]).repeat(2))


def _compute_inner_size(size: tuple[int, int], fit: tuple[int, int]) -> tuple[int, int]:
    """Returns the (height, width) of an image resized to fit inside ``fit``."""
    scale = min(fit[0] / size[0], fit[1] / size[1])
    height, width = (max(1, min(limit, round(side * scale))) for limit, side in zip(fit, size, strict=True))
    return height, width


def _fit(image: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    inner = _compute_inner_size((height, width), size)
    resized = interpolate(image[None], size=inner, mode="bilinear", antialias=True)[0]
    return pad(resized, (0, size[1] - inner[1], 0, size[0] - inner[0]), value=_GREY)


@dataclass(frozen=True)
class Call:
    """One way of calling a model.

    Attributes:
        name: shown to the user.
        takes: which images fit into one call: any, those of one size, or one.
        argument: images (3, H, W) -> the model's argument.
    """

    name: str
    takes: Literal["any", "one size", "one"]
    argument: Callable[[Sequence[Tensor]], object]

    def groups(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """Splits the images, in their order, into groups that fit into one call."""
        alike = len({image.shape for image in images}) == 1
        if self.takes == "any" or (self.takes == "one size" and alike):
            return [list(images)]
        return [[image] for image in images]


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stacks images of one size to (N, 3, H, W)."""
    return torch.stack(list(images))


def take_single(images: Sequence[Tensor]) -> Tensor:
    """Returns the only image, (3, H, W)."""
    (image,) = images
    return image


def take_channels_last(call: Call) -> Call:
    """Returns the same call for a model that takes images as (H, W, 3)."""
    name = call.name.replace("3, H, W", "H, W, 3")
    return Call(name, call.takes, lambda images: _move_channels_last(call.argument(images)))


def _move_channels_last(given: object) -> object:
    if isinstance(given, Tensor):
        return given.movedim(-3, -1)
    assert isinstance(given, list)
    return [image.movedim(-3, -1) for image in given]
