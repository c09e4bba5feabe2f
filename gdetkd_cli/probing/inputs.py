"""What detectors are given: how images are prepared, and in which ways models are called with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

_GREY = 0.5  # what is left of a fixed size beside the image


@dataclass(frozen=True)
class ModelInput:
    """What a model wants its images to be.

    Attributes:
        scale: what values in 0..1 are multiplied by (255 for models that take 0..255).
        mean, std: subtracted from and divided by, per channel in its own order, after that.
        fit: (height, width) of a model that takes this size alone: images are resized to fit in, and padded at the
            right and the bottom.
        bgr: blue first, as OpenCV reads images.
    """

    scale: float = 1.0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    fit: tuple[int, int] | None = None
    bgr: bool = False

    def prepare(self, image: Tensor) -> Tensor:
        """(3, H, W) in 0..1 -> what the model wants."""
        if self.fit is not None:
            image = _fitted(image, self.fit)
        image = (image.flip(0) if self.bgr else image) * self.scale
        if self.mean is not None:
            image = image - image.new_tensor(self.mean)[:, None, None]
        if self.std is not None:
            image = image / image.new_tensor(self.std)[:, None, None]
        return image

    def to_image(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes (D, 4) xyxy in pixels of what the model was given -> in pixels of the image, (height, width), clipped.

        D detections.
        """
        if self.fit is not None:
            inner = _inner(size, self.fit)
            boxes = boxes * boxes.new_tensor([size[1] / inner[1], size[0] / inner[0]]).repeat(2)
        return boxes.clamp(min=0).minimum(boxes.new_tensor([size[1], size[0]]).repeat(2))


def _inner(size: tuple[int, int], fit: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that an image has inside ``fit``."""
    scale = min(fit[0] / size[0], fit[1] / size[1])
    return min(fit[0], round(size[0] * scale)), min(fit[1], round(size[1] * scale))


def _fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    inner = _inner((height, width), size)
    resized = interpolate(image[None], size=inner, mode="bilinear", antialias=True)[0]
    return pad(resized, (0, size[1] - inner[1], 0, size[0] - inner[0]), value=_GREY)


@dataclass(frozen=True)
class Call:
    """One way of calling a model.

    Attributes:
        name: for people.
        takes: which images go into one call: any, those of one size, or one alone.
        argument: images (3, H, W) -> what the model is given.
    """

    name: str
    takes: Literal["any", "one size", "one"]
    argument: Callable[[Sequence[Tensor]], object]

    def groups(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """The images in groups that one call takes, in their order."""
        alike = len({image.shape for image in images}) == 1
        if self.takes == "any" or (self.takes == "one size" and alike):
            return [list(images)]
        return [[image] for image in images]


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images of one size as (N, 3, H, W)."""
    return torch.stack(list(images))


def alone(images: Sequence[Tensor]) -> Tensor:
    """The one image there is, (3, H, W)."""
    (image,) = images
    return image


def channels_last(call: Call) -> Call:
    """The same call of a model that takes its images as (H, W, 3)."""
    name = call.name.replace("3, H, W", "H, W, 3")
    return Call(name, call.takes, lambda images: _last(call.argument(images)))


def _last(given: object) -> object:
    """Channels first to last."""
    if isinstance(given, Tensor):
        return given.movedim(-3, -1)
    assert isinstance(given, list)
    return [image.movedim(-3, -1) for image in given]
