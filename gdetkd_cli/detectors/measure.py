"""Measuring a pyramid: what one cell of each level is, in pixels of the tensor the pyramid is made from.

The operators between the image and a level say it exactly; ``probing`` records them in a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.geometry import locate_cells
from gdetkd_cli.probing.record import AddName, record
from gdetkd_cli.structures import LevelSpec

Forward = Callable[[Tensor], Mapping[str, Tensor]]

_SIDES = (512, 384)  # pixels; what a cell is must not depend on the image's size


def measure_levels(forward: Forward, *, device: torch.device | str = "cpu") -> tuple[LevelSpec, ...]:
    """Measures each level's stride and offset, and whether it is a subsampling of the level before.

    Args:
        forward: (N, 3, H, W) -> L maps (N, C_l, H_l, W_l) by name, fine to coarse; must be in evaluation mode.
        device: where ``forward`` wants its input.

    Raises:
        ModelError: a level does not respond to the image, or does not grow with it.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.rand(1, 3, side, side, generator=generator).to(device) for side in _SIDES]
    specs, others = (_measure(forward, image) for image in sizes)
    for one, other in zip(specs, others, strict=True):
        if (one.stride, one.offset) != (other.stride, other.offset):
            raise ModelError(
                f"pyramid level {one.name!r} has {one.shape} cells for {_SIDES[0]} pixels and {other.shape} for "
                f"{_SIDES[1]}; a feature map that grows with the image was expected"
            )
    return specs


def _measure(forward: Forward, image: Tensor) -> tuple[LevelSpec, ...]:
    maps: dict[str, Tensor] = {}

    def run(_: AddName) -> list[Tensor]:
        maps.update(forward(image))
        return list(maps.values())

    seen = record(run, {}, [image])
    specs: list[LevelSpec] = []
    before: Tensor | None = None
    for (name, level), index in zip(maps.items(), seen.results, strict=True):
        cells = None if index is None else locate_cells(seen.values, 0, index)
        if cells is None or not torch.isfinite(level).all():
            raise ModelError(
                f"pyramid level {name!r} does not respond to the image, or not with finite numbers; it cannot be "
                "used for distillation"
            )
        specs.append(
            LevelSpec(
                name=name,
                channels=level.shape[1],
                stride=cells.stride,
                offset=cells.offset,
                shape=(level.shape[-2], level.shape[-1]),
                subsampled=before is not None and is_subsampled(level, before),
            )
        )
        before = level
    return tuple(specs)


def is_subsampled(level: Tensor, before: Tensor) -> bool:
    """Whether a level only takes every k-th cell of the one before it, or the greatest of each k x k.

    A constant map says nothing of how it was made, so it is not.

    Args:
        level: (N, C, H, W).
        before: (N, C', H', W'), the next finer level of the same images.
    """
    down, across = (round(before.shape[axis] / level.shape[axis]) for axis in (-2, -1))
    constant = bool((level == level.flatten()[0]).all())
    if max(down, across) < 2 or min(down, across) < 1 or level.shape[1] != before.shape[1] or constant:
        return False
    every, greatest = before[..., ::down, ::across], max_pool2d(before, (down, across))
    return torch.equal(level, every) or torch.equal(level, greatest)
