"""Imitation near objects: which cells count, of those near an anchor that fits, or of those inside a box.

``near_object_masks`` chooses as fine-grained feature imitation does (Wang et al., CVPR 2019). An anchor of each shape
lies at every cell. A cell counts for a box where one of its anchors overlaps the box by more than a share of what the
best anchor does. The paper has one map; over a pyramid, the best anchor of all levels sets the bar, so that an object
counts on the levels of its size.

``inside_box_masks`` takes the cells inside ground-truth boxes, each box on one level, that of its size. G-DetKD's table
names such a baseline "GT mask" without more; DeFeat (Guo et al., CVPR 2021) publishes it in this form. On every level,
the finest would have three of four cells of every object, whatever its size.

Shapes: M boxes, L levels, H x W cells, A shapes of anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def near_object_masks(
    boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]], anchors: Sequence[Tensor], share: float
) -> list[Tensor]:
    """By level, (H, W) bool: the cells near an object.

    Args:
        boxes: by level, (M, 4) the same objects, xyxy in that level's cells (the centre of cell (0, 0) is (0.5, 0.5)).
        shapes: by level, (H, W).
        anchors: by level, (A, 2) width and height of the anchors around every cell's centre, in cells.
        share: of the best anchor's overlap, in 0..1; the paper's is 0.5.
    """
    overlaps = []
    for found, (height, width), sizes in zip(boxes, shapes, anchors, strict=True):
        rows, columns = (torch.arange(length, device=found.device) + 0.5 for length in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1).flatten(0, 1)
        best = found.new_zeros(height * width, len(found))
        for half in 0.5 * sizes.to(centres):
            best = torch.maximum(best, _overlaps(centres + torch.cat([-half, half]), found))
        overlaps.append(best)
    bar = share * torch.stack([level.amax(dim=0) for level in overlaps]).amax(dim=0)
    return [((level > bar) & (level > 0)).any(dim=1).view(shape) for level, shape in zip(overlaps, shapes, strict=True)]


def inside_box_masks(boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]], assigned: Tensor) -> list[Tensor]:
    """By level, (H, W) bool: the cells whose centre lies in a box of the level.

    A box that holds no centre, or lies between them, still has the cell that its own centre falls into.

    Args:
        boxes: by level, (M, 4) the same objects, xyxy in that level's cells (the centre of cell (0, 0) is (0.5, 0.5)).
        shapes: by level, (H, W).
        assigned: (M,) int64, the level of each object; one that is none of them counts nowhere.
    """
    masks = []
    for level, (found, (height, width)) in enumerate(zip(boxes, shapes, strict=True)):
        own = (assigned == level)[:, None]
        columns = _covered(found[:, 0], found[:, 2], width) & own
        rows = _covered(found[:, 1], found[:, 3], height)
        masks.append((rows[:, :, None] & columns[:, None, :]).any(dim=0))
    return masks


def _covered(low: Tensor, high: Tensor, length: int) -> Tensor:
    """(M, length) bool: the cells of an axis whose centre lies in an interval, and the one under its middle."""
    index = torch.arange(length, device=low.device)
    centres = index + 0.5
    inside = (centres >= low[:, None]) & (centres <= high[:, None])
    middle = ((low + high) / 2).floor().clamp(0, length - 1)
    return inside | (index == middle[:, None])


def _overlaps(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of every anchor (A, 4) with every box (M, 4): (A, M)."""
    low, high = torch.maximum(anchors[:, None, :2], boxes[:, :2]), torch.minimum(anchors[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas, sizes = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (anchors, boxes))
    return shared / (areas[:, None] + sizes - shared)
