"""Class predictions of dense heads: binary distillation of every cell (Yang et al., "Bridging Cross-task Protocol
Inconsistency for Distillation in Dense Object Detection", ICCV 2023, arXiv 2308.14286; its classification part).

Shapes: N images, C channels (anchors x classes), H x W cells.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def class_map_loss(student: Tensor, teacher: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over cells and channels of |sigmoid(t) - sigmoid(s)| BCE(s, sigmoid(t)), and what to divide it by.

    The factor in front keeps the many cells on which both agree that there is nothing from drowning the rest; it is
    back-propagated through, as a focal loss' is.

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits.
        inside: (N, H, W) bool, cells that count.

    Returns:
        The sum, and how many objects' worth of cells the teacher sees: the sum over cells of its greatest probability.
    """
    student, wanted = student.float(), teacher.detach().float().sigmoid()
    loss = binary_cross_entropy_with_logits(student, wanted, reduction="none") * (wanted - student.sigmoid()).abs()
    return (loss.sum(dim=1) * inside).sum(), (wanted.amax(dim=1) * inside).sum()
