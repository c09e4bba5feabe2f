"""Measuring a pyramid: what one cell of each level is, in pixels of the tensor the pyramid is made from.

The *stride* is read from how many cells a level gains when the image grows. The *offset* has two parts. A level is laid
symmetrically over the image, give or take half a cell: convolutions with stride 2 and padding 1 centre cell (0, 0) on
the first pixel, patch embeddings centre it half a stride further in. Which of the two a network does is decided by
perturbing the image at known points and looking where the levels respond. (The centroid of the response alone is too
rough: top-down paths with nearest-neighbour upsampling pull it by more than a cell in an untrained pyramid.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gdetkd_cli.errors import ModelError
from gdetkd_cli.structures import LevelSpec

Forward = Callable[[Tensor], Mapping[str, Tensor]]

_SIDE = 512  # pixels of the perturbed image
_LARGE_SIDE = 4096  # pixels; the cells gained up to this side are counted on fake tensors: shapes only
_POINTS = (0.37, 0.47, 0.62)  # where the image is perturbed, as fractions of its side, on both axes at once
_PATCH = 8  # pixels, side of a perturbed patch
_SHARPEN = 4  # responses are raised to this power: the cell right under the patch counts, not the tails


@torch.no_grad()
def measure_levels(forward: Forward, *, device: torch.device | str = "cpu") -> tuple[LevelSpec, ...]:
    """Measures each level's stride and offset.

    Args:
        forward: (N, 3, H, W) -> L maps (N, C_l, H_l, W_l) by name, fine to coarse; must be in evaluation mode.
        device: where ``forward`` wants its input.

    Raises:
        ModelError: a level does not grow with the image, or does not respond to it.
    """
    generator = torch.Generator().manual_seed(0)
    side = _SIDE
    base = torch.nn.functional.interpolate(
        torch.rand(1, 3, 24, 24, generator=generator), size=(side, side), mode="bilinear"
    )
    images = base.repeat(1 + len(_POINTS), 1, 1, 1)
    centres = []
    for i, fraction in enumerate(_POINTS):
        start = round(fraction * side) - _PATCH // 2
        images[i + 1, :, start : start + _PATCH, start : start + _PATCH] = torch.rand(
            3, _PATCH, _PATCH, generator=generator
        )
        centres.append(start + _PATCH / 2)
    points = torch.tensor(centres, dtype=torch.float64)

    named = forward(images.to(device))
    names, maps = list(named), [m.double().cpu() for m in named.values()]
    large = _shapes(forward, _LARGE_SIDE, device)
    strides = [_strides(name, m.shape[-2:], shape) for name, m, shape in zip(names, maps, large, strict=True)]
    centred = [_centred_offset(map_.shape[-2:], stride) for map_, stride in zip(maps, strides, strict=True)]
    first_pixel = [(oy - sy / 2 + 0.5, ox - sx / 2 + 0.5) for (oy, ox), (sy, sx) in zip(centred, strides, strict=True)]
    votes = []
    for name, map_, stride, a, b in zip(names, maps, strides, first_pixel, centred, strict=True):
        seen = _response_offset(name, map_, stride, points)
        votes += [abs(seen[axis] - b[axis]) < abs(seen[axis] - a[axis]) for axis in (0, 1)]
    offsets = centred if sum(votes) > len(votes) / 2 else first_pixel
    return tuple(
        LevelSpec(name=name, channels=m.shape[1], stride=stride, offset=offset, shape=(m.shape[-2], m.shape[-1]))
        for name, m, stride, offset in zip(names, maps, strides, offsets, strict=True)
    )


def _shapes(forward: Forward, side: int, device: torch.device | str) -> list[tuple[int, int]]:
    """(H, W) of each level for an image of side x side pixels, without computing them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [(m.shape[-2], m.shape[-1]) for m in forward(torch.zeros(1, 3, side, side, device=device)).values()]


def _strides(name: str, small: Sequence[int], large: Sequence[int]) -> tuple[float, float]:
    """(y, x) pixels per cell, from the cells gained between ``_SIDE`` and ``_LARGE_SIDE``."""
    gained = (large[0] - small[0], large[1] - small[1])
    if min(gained) <= 0:
        raise ModelError(
            f"pyramid level {name!r} has {tuple(small)} cells for {_SIDE} pixels and {tuple(large)} for {_LARGE_SIDE}; "
            "a feature map that grows with the image was expected"
        )
    growth = _LARGE_SIDE - _SIDE
    return growth / gained[0], growth / gained[1]


def _centred_offset(shape: Sequence[int], stride: tuple[float, float]) -> tuple[float, float]:
    """(y, x) of cell (0, 0)'s centre when the level's cells lie symmetrically over the image."""
    return (_SIDE - (shape[0] - 1) * stride[0]) / 2, (_SIDE - (shape[1] - 1) * stride[1]) / 2


def _response_offset(name: str, maps: Tensor, stride: tuple[float, float], points: Tensor) -> tuple[float, float]:
    """(y, x) of cell (0, 0)'s centre as the responses to the perturbed points suggest it."""
    response = (maps[1:] - maps[:1]).square().sum(dim=1)  # (points, H, W)
    if not torch.isfinite(response).all() or bool((response.amax(dim=(1, 2)) <= 0).any()):
        raise ModelError(f"pyramid level {name!r} does not respond to the image; it cannot be used for distillation")
    response = (response / response.amax(dim=(1, 2), keepdim=True)) ** _SHARPEN
    offsets = []
    for axis in (0, 1):
        profile = response.sum(dim=2 - axis)  # (points, cells)
        centroid = (profile * torch.arange(profile.shape[1])).sum(dim=1) / profile.sum(dim=1)
        offsets.append(float((points - stride[axis] * centroid).mean()))
    return offsets[0], offsets[1]
