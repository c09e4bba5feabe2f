"""Whole-map imitation, as FitNets does it (Romero et al., ICLR 2015, equation 3), on one level of a pyramid.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from torch import Tensor


def map_imitation_loss(adapted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over channels and cells of (S - T)^2, cells by their weight; 0 with a gradient path where all weigh nothing.

    Args:
        adapted: (N, C, H, W) the student's map in the teacher's channels.
        target: (N, C, H, W).
        weight: (N, H, W), not negative; whether a cell counts, or how much.
    """
    error = (adapted - target.detach()).square().mean(dim=1)
    weight = weight.to(error)
    return (error * weight).sum() / weight.sum().clamp(min=1e-6)
