"""Region imitation on one level: each detector pools a region from the level that it assigns the region to itself.

As mimicking does it (Li et al., CVPR 2017), and the baseline that SGFI's soft matching over levels is measured against
(G-DetKD, table 3: RoIFI). Shapes: R regions, C channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gdetkd_cli.detectors.protocol import View
from gdetkd_cli.methods.adapters import RunningNormalizer, folded, new_adapter
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.sgfi import imitation_loss


def region_imitation_loss(adapted: Tensor, target: Tensor, channels: Tensor | None = None) -> Tensor:
    """mean_i MSE(f_adapt(S_i), T_i), 0 with a gradient path where there is no region.

    Args:
        adapted: (R, C, 7, 7) the student's regions in the teacher's channels.
        target: (R, C, 7, 7) the teacher's.
        channels: (R,) how many of the C channels a region's target has; None: all.
    """
    return imitation_loss(adapted, target, channels)


class RoIImitationTerm(nn.Module):
    """Regions imitate the teacher's, each pooled from the level that its own detector assigns it to.

    Args:
        student_channels: most channels of a student level.
        teacher_channels: most channels of a teacher level.
        same_space: as in SGFITerm: the student got the teacher's head.
    """

    student_needs: frozenset[View] = frozenset({"pooled"})
    teacher_needs: frozenset[View] = frozenset({"pooled"})

    def __init__(self, *, student_channels: int, teacher_channels: int, same_space: bool = False) -> None:
        super().__init__()
        self.adapter = new_adapter(student_channels, teacher_channels, same_space)
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
            adapted = conv2d(student.float(), *folded(self.adapter, affine))
        return region_imitation_loss(adapted, target, channels)


def build(pair: Detectors) -> RoIImitationTerm:
    """The term of a pair; any pair has one."""
    return RoIImitationTerm(
        student_channels=max(pair.student_channels),
        teacher_channels=max(pair.teacher_channels),
        same_space=pair.same_space,
    )
