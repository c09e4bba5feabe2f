"""Channel-wise distillation (CWD; Shu et al., ICCV 2021, equations 3 and 4), on one level of a pyramid.

Shapes: N images, C channels, H x W cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.maps import OUTSIDE, MapSettings, MapTerm, read_map_settings


def channel_divergence(student: Tensor, teacher: Tensor, inside: Tensor, tau: float) -> Tensor:
    """tau^2 / C * sum over channels of KL(teacher || student), each a softmax over the cells; mean over images.

    Args:
        student, teacher: (N, C, H, W).
        inside: (N, H, W) bool, the cells to compare; an image without any adds 0.
        tau: temperature.
    """
    # If an image has no cell to compare, both distributions are uniform and it adds 0.
    outside = ~inside.flatten(1)[:, None]
    ours, theirs = (
        (maps.flatten(2).float() / tau).masked_fill(outside, OUTSIDE).log_softmax(dim=2)
        for maps in (student, teacher.detach())
    )
    total = kl_div(ours, theirs, reduction="sum", log_target=True)
    return tau**2 * total / (student.shape[0] * student.shape[1])


class CWDTerm(MapTerm):
    """Each channel imitates where the teacher's channel is active; sum over levels, as published.

    Args:
        settings: of the pair.
        tau: temperature of the softmax over cells.
    """

    def __init__(self, settings: MapSettings, *, tau: float) -> None:
        super().__init__(settings, adapt=False)
        self.tau = tau

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [
            channel_divergence(level.adapted, level.target, level.inside, self.tau) for level in self.levels(pair)
        ]
        return torch.stack(losses).sum()


def build(pair: Detectors, *, tau: float, pooled_levels: bool) -> CWDTerm:
    """Builds the term; any pair allows it."""
    return CWDTerm(read_map_settings(pair, pooled_levels=pooled_levels), tau=tau)
