"""Prepares images as a transformers ``preprocessor_config.json`` describes, on tensors and on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor
from torch.nn.functional import interpolate, pad

from gdetkd_cli.errors import ModelError

_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers of its filters
_Side = Annotated[int, Field(strict=True, ge=32, le=2**14)]  # pixels
_Triple = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(min_length=3, max_length=3)]


class _Size(BaseModel):
    height: _Side | None = None
    width: _Side | None = None
    shortest_edge: _Side | None = None
    longest_edge: _Side | None = None


class _Config(BaseModel):
    """The fields of a ``preprocessor_config.json`` that count here, with RT-DETR's defaults."""

    do_resize: bool = True
    size: _Size | _Side = _Size(height=640, width=640)
    max_size: _Side | None = None  # in older files
    resample: Literal[0, 2, 3] = 2
    do_rescale: bool = True
    rescale_factor: float = Field(1 / 255, gt=0, le=255)
    do_normalize: bool = False
    image_mean: _Triple = (0.485, 0.456, 0.406)
    image_std: _Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Prepared:
    """The input of a model.

    Attributes:
        pixels: (N, 3, H, W).
        sizes: (height, width) pixels of each resized image inside the padding.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]

    @property
    def mask(self) -> Tensor:
        """(N, H, W) int64, 1 inside an image and 0 in the padding."""
        mask = self.pixels.new_zeros((len(self.sizes), *self.pixels.shape[-2:]), dtype=torch.int64)
        for row, (height, width) in zip(mask, self.sizes, strict=True):
            row[:height, :width] = 1
        return mask

    @property
    def is_padded(self) -> bool:
        return any(size != tuple(self.pixels.shape[-2:]) for size in self.sizes)


@dataclass(frozen=True)
class Preparation:
    """Resizes, scales, normalises and pads images.

    Attributes:
        height, width: fixed size in pixels; None: the next two decide.
        shortest, longest: the short side in pixels, unless the long side would exceed ``longest``.
        resample: PIL's number of the filter.
        scale: factor of the values in 0..1.
        mean, std: subtracted and divided by after scaling; None: neither.
    """

    height: int | None
    width: int | None
    shortest: int
    longest: int
    resample: int
    scale: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Preparation:
        """Reads the fields of a ``preprocessor_config.json``; absent ones have RT-DETR's defaults.

        Raises:
            ModelError: a field is of another kind, or the size is incomplete.
        """
        try:
            fields = _Config.model_validate({name: value for name, value in config.items() if value is not None})
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            raise ModelError(f"the preprocessor's {name} cannot be used: {repr(config[name])[:80]}") from error
        size = fields.size
        if isinstance(size, int):
            size = _Size(shortest_edge=size, longest_edge=fields.max_size)
        fixed = size.height is not None and size.width is not None
        if fields.do_resize and not fixed and size.shortest_edge is None:
            raise ModelError("the preprocessor's size needs height and width, or shortest_edge and longest_edge")
        if not all(value > 0 for value in fields.image_std):
            raise ModelError(f"the preprocessor's image_std must be above 0, got {fields.image_std}")
        shortest = size.shortest_edge or 0
        return cls(
            height=size.height if fields.do_resize and fixed else None,
            width=size.width if fields.do_resize and fixed else None,
            shortest=shortest if fields.do_resize else 0,
            longest=size.longest_edge or 10 * shortest,
            resample=fields.resample,
            scale=255.0 * fields.rescale_factor if fields.do_rescale else 255.0,
            mean=fields.image_mean if fields.do_normalize else None,
            std=fields.image_std if fields.do_normalize else None,
        )

    def compute_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) to which an image is resized."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        if not self.shortest:
            return height, width
        short, long = sorted((height, width))
        side = float(self.shortest)  # rounded in the way of transformers
        if long / short * side > self.longest:
            side = self.longest * short / long
        if short == round(side):
            return height, width
        resized = round(side), int(side * long / short)
        return resized if height <= width else (resized[1], resized[0])

    def __call__(self, images: Sequence[Tensor]) -> Prepared:
        """Prepares images (3, H_i, W_i) in 0..1; the padding is at the right and the bottom."""
        prepared = [self.prepare(image) for image in images]
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in prepared]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        pixels = torch.stack([pad(i, (0, width - w, 0, height - h)) for i, (h, w) in zip(prepared, sizes, strict=True)])
        return Prepared(pixels, sizes)

    def prepare(self, image: Tensor) -> Tensor:
        """Resizes, scales and normalises an image (3, H, W); when traced, also images (N, 3, H, W) of one size."""
        size = self.compute_size(image.shape[-2], image.shape[-1])
        mode = _MODES[self.resample]
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # a file resizes every image
            image = resize_in_graph(image, size)
        elif tuple(image.shape[-2:]) != size:
            image = interpolate(image[None], size=size, mode=mode, antialias=mode != "nearest")[0]
        image = image * self.scale
        if self.mean is None or self.std is None:
            return image
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image - mean) / std


def resize_in_graph(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``interpolate`` with ``mode="bilinear", antialias=True`` as two matrix products, which every exporter can write.

    Args:
        image: (..., 3, H, W), of any size when the graph runs.
        size: (height, width) pixels of the result.
    """
    down, across = (_compute_weights(image.shape[axis], side, image) for axis, side in zip((-2, -1), size, strict=True))
    return down @ image @ across.transpose(0, 1)


def _compute_weights(before: int | Tensor, after: int, like: Tensor) -> Tensor:
    """(after, before): how much each pixel counts for each new one; a triangle as wide as two of the larger pixels."""
    given = torch.as_tensor(before, device=like.device).to(like.dtype)
    scale = given / after
    centre = (torch.arange(after, device=like.device).to(like.dtype) + 0.5) * scale
    pixels = torch.arange(before, device=like.device).to(like.dtype) + 0.5  # type: ignore[arg-type]  # traced: a tensor
    weights = (1 - (pixels[None] - centre[:, None]).abs() / scale.clamp(min=1.0)).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)
