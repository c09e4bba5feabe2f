"""How images are prepared for a model, and the ways of calling a model with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils._pytree import tree_map

_GREY = 0.5  # fills the rest of a fixed size
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue; ITU-R BT.601, as in most image libraries


@dataclass(frozen=True)
class ModelInput:
    """How images are prepared for a model.

    Attributes:
        scale: factor of the values in 0..1 (255 for models that take 0..255).
        mean, std: subtracted and divided by after scaling, per channel, in the model's channel order.
        fit: (height, width) of a model with a fixed input size: images are resized to fit in, and padded at the right
            and the bottom.
        multiple: without ``fit``, images are padded at the right and the bottom to multiples of this many pixels.
        bgr: the model takes blue first, as OpenCV reads images.
        grey: the model takes one channel, the luminance; ``mean`` and ``std`` count before it.
    """

    scale: float = 1.0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    fit: tuple[int, int] | None = None
    multiple: int = 1
    bgr: bool = False
    grey: bool = False

    def prepare(self, image: Tensor) -> Tensor:
        """Converts an image (3, H, W) in 0..1 to the model's input, (3, H, W) or, if grey, (1, H, W)."""
        if self.fit is not None:
            image = _fit(image, self.fit)
        elif self.multiple > 1:
            right, bottom = (-side % self.multiple for side in (image.shape[-1], image.shape[-2]))
            image = pad(image, (0, right, 0, bottom), value=_GREY)
        image = (image.flip(0) if self.bgr else image) * self.scale
        if self.mean is not None:
            image = image - image.new_tensor(self.mean)[:, None, None]
        if self.std is not None:
            image = image / image.new_tensor(self.std)[:, None, None]
        if self.grey:
            weights = image.new_tensor(_LUMINANCE[::-1] if self.bgr else _LUMINANCE)
            image = (image * weights[:, None, None]).sum(dim=0, keepdim=True)
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
        arrange: images (C, H, W) -> the model's argument.
        dtype: of the images; uint8: values 0..255, rounded.
        batch: number of images that every call needs, or None; fewer are filled up with copies of the last.
    """

    name: str
    takes: Literal["any", "one size", "one"]
    arrange: Callable[[Sequence[Tensor]], object]
    dtype: torch.dtype = torch.float32
    batch: int | None = None

    def groups(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """Splits the images, in their order, into groups that fit into one call."""
        alike = len({image.shape for image in images}) == 1
        if self.takes == "any" or (self.takes == "one size" and alike):
            count = self.batch or len(images) or 1
            return [list(images[start : start + count]) for start in range(0, len(images), count)]
        return [[image] for image in images]

    def argument(self, images: Sequence[Tensor]) -> object:
        """Converts images (C, H, W) that fit into one call to the model's argument."""
        filled = [*images, *[images[-1]] * ((self.batch or len(images)) - len(images))]
        if self.dtype == torch.uint8:
            filled = [image.round().clamp(0, 255) for image in filled]
        return self.arrange(filled if self.dtype == torch.float32 else [image.to(self.dtype) for image in filled])

    def keep(self, result: object, count: int) -> object:
        """Returns a call's result for its first ``count`` images, without the copies that filled the batch."""
        if self.batch is None:
            return result
        if isinstance(result, list) and len(result) == self.batch and all(isinstance(row, Mapping) for row in result):
            return result[:count]
        return tree_map(lambda value: value[:count] if self.is_batch(value) else value, result)

    def is_batch(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.shape[:1] == (self.batch,)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stacks images of one size to (N, C, H, W)."""
    return torch.stack(list(images))


def take_single(images: Sequence[Tensor]) -> Tensor:
    """Returns the only image, (C, H, W)."""
    (image,) = images
    return image


def take_channels_last(call: Call) -> Call:
    """Returns the same call for a model that takes images as (H, W, C)."""
    name = re.sub(r"(\d), H, W", r"H, W, \1", call.name)
    return replace(call, name=name, arrange=lambda images: _move_channels_last(call.arrange(images)))


def _move_channels_last(given: object) -> object:
    if isinstance(given, Tensor):
        return given.movedim(-3, -1)
    assert isinstance(given, list)
    return [image.movedim(-3, -1) for image in given]
