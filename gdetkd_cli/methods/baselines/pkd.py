"""Imitation by Pearson correlation (PKD; Cao et al., NeurIPS 2022, equations 3 to 5), on one level of a pyramid.

Shapes: N images, C channels, H x W cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.maps import MapTerm, map_settings


def pearson_loss(student: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
    """Mean over channels of 1 - r, the correlation of both over all cells of the batch: half the mean squared
    difference of the standardised maps. 0 with a gradient path where no cell counts.

    Args:
        student, teacher: (N, C, H, W).
        inside: (N, H, W) bool, the cells that count.
    """
    weight = inside[:, None].float()
    count = weight.sum().clamp(min=1)
    ours, theirs = (_standardised(x.float(), weight, count) for x in (student, teacher.detach()))
    return 0.5 * ((ours - theirs).square() * weight).sum() / (count * student.shape[1])


def _standardised(maps: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """(N, C, H, W) -> each channel with mean 0 and deviation 1 over the cells that count, ``weight`` (N, 1, H, W)."""
    centred = maps - (maps * weight).sum(dim=(0, 2, 3), keepdim=True) / count
    variance = (centred.square() * weight).sum(dim=(0, 2, 3), keepdim=True) / count
    return centred / (variance + 1e-12).sqrt()


class PKDTerm(MapTerm):
    """Every level correlates with the teacher's, channel by channel; sum over levels, as published."""

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        counted: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            counted=counted,
            adapt=False,
            standardize=None,
        )

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [pearson_loss(level.adapted, level.target, level.inside) for level in self.levels(pair)]
        return torch.stack(losses).sum()


def build(pair: Detectors, *, pooled_levels: bool) -> PKDTerm:
    """The term of a pair; any pair has one."""
    return PKDTerm(**map_settings(pair, pooled_levels=pooled_levels))
