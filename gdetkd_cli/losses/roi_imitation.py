"""Region imitation on one level: each detector pools a region from the level that it assigns the region to itself.

As mimicking does it (Li et al., CVPR 2017), and the baseline that SGFI's soft matching over levels is measured against
(G-DetKD, table 3: RoIFI). Shapes: R regions, C channels.
"""

from __future__ import annotations

from torch import Tensor

from gdetkd_cli.losses.sgfi import imitation_loss


def region_imitation_loss(adapted: Tensor, target: Tensor, channels: Tensor | None = None) -> Tensor:
    """mean_i MSE(f_adapt(S_i), T_i), 0 with a gradient path where there is no region.

    Args:
        adapted: (R, C, 7, 7) the student's regions in the teacher's channels.
        target: (R, C, 7, 7) the teacher's.
        channels: (R,) how many of the C channels a region's target has; None: all.
    """
    return imitation_loss(adapted, target, channels)
