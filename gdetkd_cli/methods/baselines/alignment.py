"""Resamples teacher maps to the cells of the student's maps, for terms that compare whole pyramids.

A student level is compared with the teacher level of the nearest stride in pixels of the image, whatever its index.
Shapes: N images, C_s and C_t channels of student and teacher, H x W cells of the student's level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, grid_sample

from gdetkd_cli.host import copy_tensor
from gdetkd_cli.methods.processes import count_processes, sum_over_processes
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


class LevelPairing(nn.Module):
    """The teacher level of each student level: the one with the nearest stride in pixels of the image.

    The first batch decides, for the whole run and for all processes. Otherwise the shapes of a batch's images could
    change a level's target from step to step, where each detector resizes them in its own way.

    Args:
        student_levels: L.
    """

    levels: Tensor

    def __init__(self, student_levels: int) -> None:
        super().__init__()
        self.register_buffer("levels", torch.full((student_levels,), -1))
        self._known: list[int] | None = None  # on the host, because reading a buffer would wait for the device
        self.register_load_state_dict_pre_hook(self._load)  # type: ignore[no-untyped-call]

    def forward(self, student: Pyramid, teacher: Pyramid) -> list[int]:
        """Returns indices of teacher levels."""
        if self._known is None:
            difference = _measure_scale(student) - _measure_scale(teacher)
            if count_processes() > 1:
                total = sum_over_processes(torch.tensor(difference, device=self.levels.device))
                difference = float(total) / count_processes()
            factor = exp(difference)
            ours, theirs = _list_strides(student.levels), [factor * s for s in _list_strides(teacher.levels)]
            chosen = [min(range(len(theirs)), key=lambda i: abs(log(stride / theirs[i]))) for stride in ours]
            self.levels.copy_(copy_tensor(torch.tensor(chosen), self.levels))
            self._known = chosen
        return self._known

    def _load(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        # A checkpoint of an older version has no levels, one from before the first step has none that are chosen.
        found = state.setdefault(f"{prefix}levels", torch.full_like(self.levels, -1))
        self._known = found.tolist() if int(found.min()) >= 0 else None


def align(
    student: Pyramid, teacher: Pyramid, sizes: Sequence[tuple[int, int]], chosen: Sequence[int]
) -> list[AlignedLevel]:
    """Resamples the teacher level of every student level to the student's cells.

    Args:
        student, teacher: pyramids of the same batch.
        sizes: (height, width) of each batch image, in pixels.
        chosen: the teacher level of each student level.
    """
    factor = exp(_measure_scale(teacher) - _measure_scale(student))
    strides = _list_strides(teacher.levels)
    aligned = []
    for level, (stride, other) in enumerate(zip(_list_strides(student.levels), chosen, strict=True)):
        samples = max(1, round(factor * stride / strides[other]))
        aligned.append(_align_level(student, level, teacher, other, samples, sizes))
    return aligned


def _measure_scale(pyramid: Pyramid) -> float:
    """Logarithm of the model's pixels per pixel of the image, the mean over images and axes."""
    return float(pyramid.frame.on_host().scale.log().mean())


def _list_strides(levels: Sequence[LevelSpec]) -> list[float]:
    """By level, the geometric mean of both axes' strides, in pixels of the model."""
    return [(level.stride[0] * level.stride[1]) ** 0.5 for level in levels]


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
        centre, there = (places.unflatten(1, (count, samples)).mean(dim=2) for places in (image, cells))
        insides.append((centre >= 0) & (centre <= end) & (there >= 0) & (there <= length))
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
