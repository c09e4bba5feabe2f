"""Imitation by Pearson correlation (PKD; Cao et al., NeurIPS 2022, equations 3 to 5), on one level of a pyramid.

Shapes: N images, C channels, H x W cells."""

from __future__ import annotations

import torch
from torch import Tensor

from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.maps import MapSettings, MapTerm, read_map_settings


def pearson_loss(student: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
    """Mean over channels of 1 - r, with r the correlation over all cells of the batch; 0 with a gradient path if none.

    This equals half the mean squared difference of the standardised maps.

    Args:
        student, teacher: (N, C, H, W).
        inside: (N, H, W) bool, the cells to compare.
    """
    weight = inside[:, None].float()
    count = weight.sum().clamp(min=1)
    ours, theirs = (_standardise(x.float(), weight, count) for x in (student, teacher.detach()))
    return 0.5 * ((ours - theirs).square() * weight).sum() / (count * student.shape[1])


def _standardise(maps: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Standardises (N, C, H, W) per channel over the cells with ``weight`` (N, 1, H, W) 1."""
    centred = maps - (maps * weight).sum(dim=(0, 2, 3), keepdim=True) / count
    variance = (centred.square() * weight).sum(dim=(0, 2, 3), keepdim=True) / count
    return centred / (variance + 1e-12).sqrt()


class PKDTerm(MapTerm):
    """Every level imitates the teacher's by correlation, channel by channel; sum over levels, as published."""

    def __init__(self, settings: MapSettings) -> None:
        super().__init__(settings, adapt=False, standardize=None)

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [pearson_loss(level.adapted, level.target, level.inside) for level in self.levels(pair)]
        return torch.stack(losses).sum()


def build(pair: Detectors, *, pooled_levels: bool) -> PKDTerm:
    """Builds the term; any pair allows it."""
    return PKDTerm(read_map_settings(pair, pooled_levels=pooled_levels))
