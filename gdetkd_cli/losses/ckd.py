"""Contrastive distillation over regions: the equations (G-DetKD, arXiv 2108.07482).

Shapes: R regions of this process's batch, Q remembered regions, D channels of the common space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float,
    negatives: Tensor,
    memory: Tensor | None = None,
    memory_negatives: Tensor | None = None,
) -> Tensor:
    """L_ckd = mean_i -log exp g(s_i, t_i) / sum over j in {i} and the negatives of exp g(s_i, t_j), g = cos / gamma.

    The positive always stays in the denominator: the loss is >= 0, and 0 at a perfect match with far negatives.

    Args:
        student: (R, D) projected student embeddings.
        teacher: (R, D) projected teacher embeddings of the same regions.
        gamma: temperature.
        negatives: (R, R) bool, entry (i, j): teacher row j is a negative of region i. The diagonal is ignored.
        memory: (Q, D) projected teacher embeddings of earlier regions.
        memory_negatives: (R, Q) bool.
    """
    if not len(student):
        return student.sum() * 0.0 + teacher.sum() * 0.0
    # exp(1 / 0.07) overflows half precision; everything from here on is float32.
    with torch.autocast(student.device.type, enabled=False):
        s = normalize(student.float(), dim=1)
        candidates = teacher.float() if memory is None else torch.cat([teacher.float(), memory.float()])
        logits = s @ normalize(candidates, dim=1).T / gamma  # (R, R + Q)
        itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
        kept = negatives | itself
        if memory_negatives is not None:
            kept = torch.cat([kept, memory_negatives], dim=1)
        positive = logits.diagonal()
        return (logits.masked_fill(~kept, float("-inf")).logsumexp(dim=1) - positive).mean()


def overlap_negatives(iou: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """(R, R) bool: region j is a negative of region i unless it is i, or overlaps it in the same image.

    Args:
        iou: (R, R) intersection over union, whatever the images.
        image_index: (R,) image of each region.
        threshold: regions of one image that overlap more are the same thing, not negatives.
    """
    same_image = image_index[:, None] == image_index[None, :]
    negatives = ~(same_image & (iou > threshold))
    return negatives.fill_diagonal_(False)
