"""Measures a pyramid: the stride and offset of each level's cells, in model pixels.

The operators between the image and a level determine both exactly; ``probing`` records them during a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.geometry import depends_on, locate_cells, tile_frame
from gdetkd_cli.probing.record import AddName, record
from gdetkd_cli.structures import LevelSpec

Forward = Callable[[Tensor], Mapping[str, Tensor]]

SIDES = (512, 384)  # pixels; the geometry of a cell must not depend on the size of the image


def measure_levels(forward: Forward, *, device: torch.device | str = "cpu") -> tuple[LevelSpec, ...]:
    """Measures each level's stride and offset, and whether it only subsamples the level before it.

    Args:
        forward: (N, 3, H, W) -> L maps (N, C_l, H_l, W_l) by name, fine to coarse; must be in evaluation mode.
        device: of the input of ``forward``.

    Raises:
        ModelError: a level does not respond to the image, or does not grow with it.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.rand(1, 3, side, side, generator=generator).to(device) for side in SIDES]
    specs, others = (_measure(forward, image) for image in sizes)
    for one, other in zip(specs, others, strict=True):
        if (one.stride, one.offset) != (other.stride, other.offset):
            raise ModelError(
                f"pyramid level {one.name!r} has {one.shape} cells for {SIDES[0]} pixels and {other.shape} for "
                f"{SIDES[1]}; expected a feature map that grows with the image"
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
        if index is None or not depends_on(seen.values, 0, index) or not torch.isfinite(level).all():
            raise ModelError(
                f"pyramid level {name!r} does not respond to the image, or is not finite; distillation cannot use it"
            )
        shape = (level.shape[-2], level.shape[-1])
        # Transformers join their patches in ways that no chain of maps shows.
        cells = locate_cells(seen.values, 0, index) or tile_frame(image.shape[-2:], shape)
        specs.append(
            LevelSpec(
                name=name,
                channels=level.shape[1],
                stride=cells.stride,
                offset=cells.offset,
                shape=shape,
                subsampled=before is not None and is_subsampled(level, before),
            )
        )
        before = level
    return tuple(specs)


def is_subsampled(level: Tensor, before: Tensor) -> bool:
    """Whether a level repeats every k-th cell of the one before it, or the greatest of each k x k cells.

    False for a constant map, since it does not show how it was computed.

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
