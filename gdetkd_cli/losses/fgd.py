"""Focal and global distillation (FGD; Yang et al., CVPR 2022), on one level of a pyramid.

Focal: the teacher's attention over cells and channels weighs the imitation, objects and background apart (equations 4
to 8), and the student's attention follows it (9). Global: what each map says of its whole, through a context block,
is imitated as well (10 to 12). Sums over channels and cells, means over images, as published.

Shapes: N images, C channels, H x W cells, M boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss


def attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N, H, W) with the sum H W, and (N, C) with the sum C: softmax of the mean absolute values."""
    n, channels, height, width = maps.shape
    size = maps.abs()
    cells = (size.mean(dim=1).flatten(1) / temperature).softmax(dim=1) * (height * width)
    return cells.view(n, height, width), (size.mean(dim=(2, 3)) / temperature).softmax(dim=1) * channels


def object_masks(boxes: Sequence[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights (N, H, W) of objects and of background.

    A cell of an object weighs one over its box's cells, of several boxes the smallest's; one of the background weighs
    one over the image's background cells.

    Args:
        boxes: by image, (M, 4) xyxy in cells of the level.
        shape: (H, W).
    """
    height, width = shape
    objects = torch.zeros(len(boxes), height, width, device=boxes[0].device)
    for mask, found in zip(objects, boxes, strict=True):
        for x1, y1, x2, y2 in found.tolist():
            columns, rows = _cells_between(x1, x2, width), _cells_between(y1, y2, height)
            inner = mask[rows, columns]
            inner.clamp_(min=1.0 / inner.numel())
    background = (objects == 0).float()
    return objects, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _cells_between(low: float, high: float, length: int) -> slice:
    """The cells of an axis that an interval touches; one at least."""
    first = min(max(floor(low), 0), length - 1)
    return slice(first, min(max(ceil(high), first + 1), length))


def focal_losses(
    student: Tensor, teacher: Tensor, objects: Tensor, background: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Imitation of objects, imitation of background, and of the attentions.

    Args:
        student, teacher: (N, C, H, W).
        objects, background: (N, H, W) weights, as ``object_masks`` gives them.
        temperature: of the attentions.
    """
    teacher = teacher.detach()
    (cells_s, channels_s), (cells_t, channels_t) = (attention(maps, temperature) for maps in (student, teacher))
    error = ((student - teacher).square() * channels_t[:, :, None, None]).sum(dim=1) * cells_t  # (N, H, W)
    images = len(student)
    follow = l1_loss(cells_s, cells_t, reduction="sum") + l1_loss(channels_s, channels_t, reduction="sum")
    return (error * objects).sum() / images, (error * background).sum() / images, follow / images


class ContextBlock(nn.Module):
    """GCNet's global context, added to a map: (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # as published: at the start the block adds nothing
        nn.init.zeros_(last.bias)

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.attend(maps).flatten(2).softmax(dim=2)  # (N, 1, HW)
        context = (maps.flatten(2) * weights).sum(dim=2)
        return maps + self.transform(context)[:, :, None, None]


def global_loss(student: Tensor, teacher: Tensor, student_block: ContextBlock, teacher_block: ContextBlock) -> Tensor:
    """The squared difference of both maps through their own context blocks, summed; mean over images."""
    return mse_loss(student_block(student), teacher_block(teacher.detach()), reduction="sum") / len(student)
