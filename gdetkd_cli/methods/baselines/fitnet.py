"""Whole-map imitation (FitNets; Romero et al., ICLR 2015, equation 3), on one level of a pyramid.

Shapes: N images, C channels, H x W cells."""

from __future__ import annotations

import torch
from torch import Tensor

from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.maps import MapTerm, read_map_settings


def map_imitation_loss(adapted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over cells of (S - T)^2, mean over channels; 0 with a gradient path if all weights are 0.

    Args:
        adapted: (N, C, H, W) the student's map in the teacher's channels.
        target: (N, C, H, W).
        weight: (N, H, W), bool or not negative.
    """
    error = (adapted - target.detach()).square().mean(dim=1)
    weight = weight.to(error)
    return (error * weight).sum() / weight.sum().clamp(min=1e-6)


class FitNetTerm(MapTerm):
    """Every level imitates the whole map; mean over levels."""

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [map_imitation_loss(level.adapted, level.target, level.inside) for level in self.levels(pair)]
        return torch.stack(losses).mean()


def build(pair: Detectors, *, pooled_levels: bool) -> FitNetTerm:
    """Builds the term; any pair allows it."""
    return FitNetTerm(read_map_settings(pair, pooled_levels=pooled_levels))
