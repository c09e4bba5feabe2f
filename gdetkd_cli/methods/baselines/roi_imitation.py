"""Region imitation on one level: mean_i MSE(f_adapt(S_i), T_i), each region pooled from its detector's own level.

This is mimicking (Li et al., CVPR 2017), the baseline of SGFI's soft matching over levels (G-DetKD, table 3: RoIFI)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gdetkd_cli.detectors.protocol import View
from gdetkd_cli.methods.adapters import RunningNormalizer, build_adapter, fold_affine
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.sgfi import imitation_loss


class RoIImitationTerm(nn.Module):
    """Each region imitates the teacher's, both pooled from the level that their detector assigns.

    Args:
        student_channels: maximum over the student's levels.
        teacher_channels: maximum over the teacher's levels.
        same_space: see ``Detectors``.
    """

    student_needs: frozenset[View] = frozenset({"pooled"})
    teacher_needs: frozenset[View] = frozenset({"pooled"})

    def __init__(self, *, student_channels: int, teacher_channels: int, same_space: bool = False) -> None:
        super().__init__()
        self.adapter = build_adapter(student_channels, teacher_channels, same_space)
        self.same_space = same_space
        self.normalizer = RunningNormalizer(channels=teacher_channels, per_channel=True)

    def forward(self, pair: ObservedPair) -> Tensor:
        student, target = pair.student_view.pooled, pair.teacher_view.pooled
        channels = pair.teacher_view.pooled_channels
        assert student is not None and target is not None
        self.normalizer.update(target, channels)
        target = self.normalizer(target.float(), channels)
        affine = self.normalizer.affine() if self.same_space else None
        with torch.autocast(target.device.type, enabled=False):
            adapted = conv2d(student.float(), *fold_affine(self.adapter, affine))
        return imitation_loss(adapted, target, channels)


def build(pair: Detectors) -> RoIImitationTerm:
    """Builds the term; any pair allows it."""
    return RoIImitationTerm(
        student_channels=max(pair.student_channels),
        teacher_channels=max(pair.teacher_channels),
        same_space=pair.same_space,
    )
