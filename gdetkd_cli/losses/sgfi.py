"""Semantic-guided feature imitation: the equations (G-DetKD, arXiv 2108.07482).

Shapes: R regions, L levels, C channels of the teacher, D embedding channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

_LEAST_NORM = 1e-3  # of an embedding: the gradient of a shorter one's direction would explode


def level_attention(keys: Tensor, queries: Tensor, tau: Tensor, prior: Tensor | None = None) -> Tensor:
    """a_i = softmax over levels of <k_il, q_i> / tau + prior_il.

    Args:
        keys: (R, L, D) embeddings of the student's region features on each level.
        queries: (R, D) embeddings of the teacher's region features.
        tau: positive scalar.
        prior: (R, L) logits that the match starts from; None: none, as in the paper.

    Returns:
        (R, L); the weights of a region sum to 1.
    """
    logits = (keys * queries[:, None]).sum(dim=2) / tau
    return (logits if prior is None else logits + prior).softmax(dim=1)


def unit(embedding: Tensor) -> Tensor:
    """(..., D) at length 1, so that <k_il, q_i> is the cosine between them."""
    return normalize(embedding, dim=-1, eps=_LEAST_NORM)


def level_prior(octaves: Tensor, centre: Tensor, strength: float) -> Tensor:
    """prior_il = -strength (octaves_il - centre_i)^2: a level loses by the octaves that it lies away.

    Args:
        octaves: (R, L) log2 of the stride of each student level, in pixels of the region's image.
        centre: (R,) log2 of the stride that the match of each region starts from.
        strength: 0 favours none.

    Returns:
        (R, L) logits.
    """
    return -strength * (octaves - centre[:, None]).square()


def imitation_loss(imitation: Tensor, target: Tensor, channels: Tensor | None = None) -> Tensor:
    """L_sgfi = mean_i MSE(sum_l a_il A_il, T_i), 0 with a gradient path where there is no region.

    Args:
        imitation: (R, C, 7, 7) the student's aggregate.
        target: (R, C, 7, 7) the teacher's features.
        channels: (R,) how many of the C channels a region's target has (a pyramid whose levels differ in channels is
            padded with zeros); None: all.
    """
    if channels is None:
        return mse_loss(imitation, target.detach()) if len(imitation) else imitation.sum() * 0.0
    error = (imitation - target.detach()).square()
    valid = (torch.arange(error.shape[1], device=error.device) < channels[:, None])[:, :, None, None]
    cells = error.shape[2] * error.shape[3]
    per_region = (error * valid).sum(dim=(1, 2, 3)) / (channels * cells)
    return per_region.mean() if len(error) else imitation.sum() * 0.0
