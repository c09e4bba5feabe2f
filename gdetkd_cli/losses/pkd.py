"""Imitation by Pearson correlation (PKD; Cao et al., NeurIPS 2022, equations 3 to 5), on one level of a pyramid.

Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from torch import Tensor


def pearson_loss(student: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
    """Mean over channels of 1 - r, the correlation of both over all cells of the batch: half the mean squared
    difference of the standardised maps. 0 with a gradient path where no cell counts.

    Args:
        student, teacher: (N, C, H, W).
        inside: (N, H, W) bool, the cells that count.
    """
    rows = inside.flatten().nonzero()[:, 0]
    if not len(rows):
        return student.sum() * 0.0
    maps = (student, teacher.detach())
    ours, theirs = (_standardised(x.permute(0, 2, 3, 1).flatten(0, 2)[rows].float()) for x in maps)
    return 0.5 * (ours - theirs).square().mean()


def _standardised(cells: Tensor) -> Tensor:
    """(V, C) -> each channel with mean 0 and deviation 1 over the cells."""
    centred = cells - cells.mean(dim=0)
    return centred / (centred.square().mean(dim=0) + 1e-12).sqrt()
