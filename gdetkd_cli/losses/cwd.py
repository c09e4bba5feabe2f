"""Channel-wise distillation (CWD; Shu et al., ICCV 2021, equations 3 and 4), on one level of a pyramid.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div


def channel_divergence(student: Tensor, teacher: Tensor, inside: Tensor, tau: float) -> Tensor:
    """tau^2 / C * sum over channels of KL(teacher || student), each a softmax over the cells; mean over images.

    Args:
        student, teacher: (N, C, H, W).
        inside: (N, H, W) bool, the cells that count; an image without any adds 0.
        tau: temperature.
    """
    # Where no cell of an image counts, both are uniform: it adds 0, without being asked for.
    outside = ~inside.flatten(1)[:, None]
    ours, theirs = (
        (maps.flatten(2).float() / tau).masked_fill(outside, -1e4).log_softmax(dim=2)
        for maps in (student, teacher.detach())
    )
    total = kl_div(ours, theirs, reduction="sum", log_target=True)
    return tau**2 * total / (student.shape[0] * student.shape[1])
