"""Prediction distillation for two-stage heads: the equations (G-DetKD, arXiv 2108.07482).

Shapes: R regions, K classes; column 0 is background.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div


def class_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_cls = KL(softmax(teacher) || softmax(student)), mean over regions.

    Args:
        student_logits: (R, K + 1).
        teacher_logits: (R, K + 1), same columns.
    """
    if not len(student_logits):
        return student_logits.sum() * 0.0
    return kl_div(
        student_logits.float().log_softmax(dim=1),
        teacher_logits.detach().float().log_softmax(dim=1),
        log_target=True,
        reduction="batchmean",
    )


def box_loss(student_deltas: Tensor, teacher_deltas: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_reg = 1/R sum_i |sum_c p_t^c (reg_t^c - reg_s^c)|: class-aware localisation.

    The background column carries no box and is left out (its deltas are never trained). The absolute value is taken
    per coordinate and summed over the four.

    Args:
        student_deltas: (R, K + 1, 4) in the box coding that both heads share.
        teacher_deltas: (R, K + 1, 4).
        teacher_logits: (R, K + 1).
    """
    if not len(student_deltas):
        return student_deltas.sum() * 0.0
    probability = teacher_logits.detach().float().softmax(dim=1)[:, 1:, None]
    difference = teacher_deltas.detach().float()[:, 1:] - student_deltas.float()[:, 1:]
    return (probability * difference).sum(dim=1).abs().sum(dim=1).mean()
