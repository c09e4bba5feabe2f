"""Resamples teacher maps to the cells of the student's maps, for terms that compare whole pyramids.

A student level is compared with the teacher level of the nearest stride in pixels of the image, whatever its index.
Shapes: N images, C_s and C_t channels of student and teacher, H x W cells of the student's level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from gdetkd_cli.host import copy_tensor
from gdetkd_cli.structures import LevelSpec, Pyramid

_SAME = 1e-3  # cells; nearer centres count as equal


@dataclass(frozen=True)
class AlignedLevel:
    """One student level and the teacher's features at its cells.

    Attributes:
        student: (N, C_s, H, W).
        teacher: (N, C_t, H, W), float32, without gradient.
        inside: (N, H, W) bool, cells with their centre in the image and on the teacher's map.
        teacher_level: index of the teacher's level.
    """

    student: Tensor
    teacher: Tensor
    inside: Tensor
    teacher_level: int


def align(student: Pyramid, teacher: Pyramid, sizes: Sequence[tuple[int, int]]) -> list[AlignedLevel]:
    """Pairs every student level with the teacher level of the nearest stride, resampled to its cells.

    Args:
        student, teacher: pyramids of the same batch.
        sizes: (height, width) of each batch image, in pixels.
    """
    ours, theirs = (_measure_strides(pyramid) for pyramid in (student, teacher))
    aligned = []
    for level, stride in enumerate(ours):
        nearest = min(range(len(theirs)), key=lambda i: abs(log(stride / theirs[i])))
        aligned.append(_align_level(student, level, teacher, nearest, max(1, round(stride / theirs[nearest])), sizes))
    return aligned


def _measure_strides(pyramid: Pyramid) -> list[float]:
    """By level, the geometric mean of the strides over images and axes, in pixels of the image."""
    scale = float(pyramid.frame.on_host().scale.log().mean().exp())
    return [(level.stride[0] * level.stride[1]) ** 0.5 / scale for level in pyramid.levels]


def _align_level(
    student: Pyramid, level: int, teacher: Pyramid, nearest: int, samples: int, sizes: Sequence[tuple[int, int]]
) -> AlignedLevel:
    """Resamples one teacher level with ``samples`` per axis and cell, so that a finer map is averaged over the cell."""
    ours, theirs = student.maps[level], teacher.maps[nearest].detach().float()
    axes, insides, same = [], [], ours.shape[2:] == theirs.shape[2:] and samples == 1
    frames = [
        pyramid.frame.on_host() for pyramid in (student, teacher)
    ]  # reading a few numbers from a device would wait
    for axis in (0, 1):  # x, y
        count = ours.shape[3 - axis]
        at = (torch.arange(count * samples, dtype=torch.float32) + 0.5) / samples - 0.5  # of cells
        stride, offset = _get_axis(student.levels[level], axis)
        image = ((at * stride + offset)[None] - frames[0].shift[:, axis, None]) / frames[0].scale[:, axis, None]
        model = image * frames[1].scale[:, axis, None] + frames[1].shift[:, axis, None]
        stride, offset = _get_axis(teacher.levels[nearest], axis)
        cells, length = (model - offset) / stride + 0.5, theirs.shape[3 - axis]
        axes.append(2 * cells / length - 1)  # grid_sample's coordinates
        same = same and bool((cells - 0.5 - torch.arange(count)).abs().max() < _SAME)
        end = image.new_tensor([size[1 - axis] for size in sizes])[:, None]
        centre = (image >= 0) & (image <= end) & (cells >= 0) & (cells <= length)
        insides.append(centre.unflatten(1, (count, samples)).float().mean(dim=2) >= 0.5)
    inside = copy_tensor(insides[1][:, :, None] & insides[0][:, None, :], ours)
    if same:  # usual for two detectors of one family
        return AlignedLevel(student=ours, teacher=theirs, inside=inside, teacher_level=nearest)
    x, y = (copy_tensor(axis, ours) for axis in axes)
    grid = torch.stack([x[:, None, :].expand(-1, y.shape[1], -1), y[:, :, None].expand(-1, -1, x.shape[1])], dim=3)
    with torch.autocast(theirs.device.type, enabled=False):
        sampled = grid_sample(theirs, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return AlignedLevel(
        student=ours,
        teacher=avg_pool2d(sampled, samples) if samples > 1 else sampled,
        inside=inside,
        teacher_level=nearest,
    )


def _get_axis(level: LevelSpec, axis: int) -> tuple[float, float]:
    """Stride and offset along x (0) or y (1)."""
    return level.stride[1 - axis], level.offset[1 - axis]
