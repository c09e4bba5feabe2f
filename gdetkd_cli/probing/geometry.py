"""Positions of a recorded value's cells, in pixels of the network's input and of the image.

Inside the network, the sizes, strides and paddings of the operators' windows give exact positions. The steps before the
first convolution (resizing, padding, letterbox) are measured: change the image at known points and see where the
network's input changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.record import Value

_POINTS = (0.2, 0.5, 0.8)  # points at which the image is changed, as fractions of each side
# Side of a changed patch in pixels, at least; the change peaks in the middle, so blur does not move its centre. A
# network that reads only some pixels of a large image still reads _READ of a patch per axis.
_PATCH = 9
_READ = 4
_FAINT = 0.1  # of the greatest change; a smaller one is not the patch's own


@dataclass(frozen=True)
class Geometry:
    """Cells in pixels, (y, x): cell (i, j) is centred at offset + (i, j) * stride, pixel (0, 0) at (0.5, 0.5)."""

    stride: tuple[float, float]
    offset: tuple[float, float]


@dataclass(frozen=True)
class _Trail(Geometry):
    size: tuple[int, int] = (0, 0)
    resampled: bool = False  # after upsampling, positions are approximate; a map added to it has the exact ones


def locate_cells(values: Sequence[Value], reference: int, level: int) -> Geometry | None:
    """Locates a level's cells in pixels of the reference; None if no chain of maps and their tokens leads to the level.

    Args:
        reference: index of the network's input, (N, C, H, W).
    """
    frame = values[reference].shape[-2:]
    trails: dict[int, _Trail] = {reference: _Trail((1.0, 1.0), (0.5, 0.5), (frame[0], frame[1]))}
    for i in range(reference + 1, level + 1):
        value = values[i]
        before = [trails[p] for p in value.parents if p in trails]
        if not before:
            continue
        if len(value.shape) == 4:
            turned = value.window is None and next((t for t in before if t.size == value.shape[1:3]), None)
            trails[i] = turned or _advance(value, before)  # turned: channels last
        elif _is_rearranged(value.shape, before[0].size):
            trails[i] = before[0]
    found = trails.get(level)
    return None if found is None else Geometry(found.stride, found.offset)


def _is_rearranged(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether a value that is no map holds one of this size: stacked before a sum, or as tokens (N, H x W, C)."""
    stacked = size in (tuple(shape[2:4]), tuple(shape[-2:]))
    return stacked or (len(shape) == 3 and prod(size) in shape[1:])


def depends_on(values: Sequence[Value], source: int, result: int) -> bool:
    """Whether a value was computed from another one.

    Args:
        source: index of the other value.
    """
    reached = {source}
    for i in range(source + 1, result + 1):
        if not reached.isdisjoint(values[i].parents):
            reached.add(i)
    return result in reached


def tile_frame(frame: Sequence[int], size: tuple[int, int]) -> Geometry:
    """Places ``size`` cells side by side over a frame of (height, width) pixels, for maps made of patches or tokens."""
    stride = (frame[0] / size[0], frame[1] / size[1])
    return Geometry(stride, (stride[0] / 2, stride[1] / 2))


def _advance(value: Value, before: Sequence[_Trail]) -> _Trail:
    """Positions of a value's cells, from those of the values that it was computed from."""
    size = (value.shape[-2], value.shape[-1])
    if value.window is not None:
        source, window = before[0], value.window
        reach = [(window.kernel[a] - 1) * window.dilation[a] / 2 - window.padding[a] for a in (0, 1)]
        return _Trail(
            stride=(source.stride[0] * window.stride[0], source.stride[1] * window.stride[1]),
            offset=(source.offset[0] + reach[0] * source.stride[0], source.offset[1] + reach[1] * source.stride[1]),
            size=size,
            resampled=source.resampled,
        )
    alike = [trail for trail in before if trail.size == size]
    if alike:
        return next((trail for trail in alike if not trail.resampled), alike[0])
    # Resampled: the cells of both sizes cover the same pixels.
    source = before[0]
    ratio = (_round_ratio(source.size[0] / size[0]), _round_ratio(source.size[1] / size[1]))
    return _Trail(
        stride=(source.stride[0] * ratio[0], source.stride[1] * ratio[1]),
        offset=(
            source.offset[0] + (ratio[0] - 1) / 2 * source.stride[0],
            source.offset[1] + (ratio[1] - 1) / 2 * source.stride[1],
        ),
        size=size,
        resampled="upsample" in value.op or source.resampled,
    )


def _round_ratio(ratio: float) -> float:
    """Rounds a ratio of cell counts (or its inverse) to a whole number within 10 %: sizes are rounded to cells."""
    whole = round(ratio) if ratio >= 1 else 1 / round(1 / ratio)
    return float(whole) if abs(ratio - whole) < 0.1 * ratio else ratio


def measure_frame(network_input: Callable[[Tensor], Tensor], image: Tensor) -> Geometry:
    """Measures where the pixels of the network's input lie, in pixels of the image.

    A drawn image takes the given one's place, so that the result depends on the size alone.

    Args:
        network_input: image (3, H, W) -> the first convolution's input (1, C, h, w).
        image: (3, H, W), of which only the size, the kind and the device count.

    Raises:
        ModelError: the network's input does not depend on the image.
    """
    height, width = image.shape[-2:]
    image = _draw_background(image)
    base = network_input(image)
    shrunk = max(height / base.shape[-2], width / base.shape[-1])
    patch_height, patch_width = (_choose_patch(side, shrunk) for side in (height, width))
    window = _bell(patch_height, image.device)[:, None] * _bell(patch_width, image.device)
    seen: list[tuple[tuple[float, float], tuple[float, float]]] = []  # (image y, x), (input y, x)
    for fraction in _POINTS:
        top, left = _place(fraction, patch_height, height), _place(fraction, patch_width, width)
        changed = image.clone()
        patch = changed[:, top : top + patch_height, left : left + patch_width]
        patch += 0.4 * window
        response = (network_input(changed) - base).abs().sum(dim=(0, 1)).double().cpu()  # (h, w)
        # A change of the image's own mean or deviation reaches every pixel, but much less.
        response = torch.where(response > _FAINT * response.max(), response, 0.0)
        if not torch.isfinite(response).all() or float(response.sum()) <= 0:
            raise ModelError("the network's input does not change with the image; expected a model that reads images")
        where = [
            float((response.sum(dim=1 - axis) * (torch.arange(response.shape[axis]) + 0.5)).sum() / response.sum())
            for axis in (0, 1)
        ]
        seen.append(((top + patch_height / 2, left + patch_width / 2), (where[0], where[1])))
    if any(len({place[1][axis] for place in seen}) < 2 for axis in (0, 1)):
        raise ModelError(
            "the network's input has too few pixels to show where they lie in the image; use a larger image"
        )
    axes = [_fit_line([s[1][a] for s in seen], [s[0][a] for s in seen]) for a in (0, 1)]
    (sy, oy), (sx, ox) = axes
    return Geometry(stride=(sy, sx), offset=(oy + sy / 2, ox + sx / 2))


def _draw_background(image: Tensor) -> Tensor:
    """Draws an image of the same kind for models that normalise each image by its own deviation or range.

    Noise gives it a deviation, weak noise lets no change be cut off, and a dark and a bright corner fix its range.
    """
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    drawn = (0.4 + 0.1 * noise).to(image)
    height, width = (max(1, side // 8) for side in image.shape[-2:])
    drawn[:, :height, :width], drawn[:, -height:, -width:] = 0.0, 1.0
    return drawn


def _choose_patch(side: int, shrunk: float) -> int:
    """Side of a patch along a side of the image, both in pixels; ``shrunk``: image pixels per pixel of the input."""
    return max(1, min(max(_PATCH, _READ * ceil(shrunk) + 1), side // 2))


def _bell(length: int, device: torch.device) -> Tensor:
    return torch.hann_window(length + 2, periodic=False, device=device)[1:-1]


def _place(fraction: float, patch: int, side: int) -> int:
    """First pixel of a patch whose middle is near this fraction of a side."""
    return min(max(0, round(fraction * side) - patch // 2), side - patch)


def _fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Returns slope and intercept of the least-squares line."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return slope, mean_y - slope * mean_x


def to_image_pixels(frame: Geometry, cells: Geometry) -> Geometry:
    """Converts cells from pixels of the network's input to pixels of the image; ``frame`` relates the two."""
    return Geometry(
        stride=(cells.stride[0] * frame.stride[0], cells.stride[1] * frame.stride[1]),
        offset=(
            frame.offset[0] + (cells.offset[0] - 0.5) * frame.stride[0],
            frame.offset[1] + (cells.offset[1] - 0.5) * frame.stride[1],
        ),
    )
