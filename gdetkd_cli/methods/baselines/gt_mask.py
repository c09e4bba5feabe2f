"""Imitation near objects: which cells count, of those near an anchor that fits, or of those inside a box.

``near_object_masks`` chooses as fine-grained feature imitation does (Wang et al., CVPR 2019). An anchor of each shape
lies at every cell. A cell counts for a box where one of its anchors overlaps the box by more than a share of what the
best anchor does. The paper has one map; over a pyramid, the best anchor of all levels sets the bar, so that an object
counts on the levels of its size.

``inside_box_masks`` takes the cells inside ground-truth boxes, each box on one level, that of its size. G-DetKD's table
names such a baseline "GT mask" without more; DeFeat (Guo et al., CVPR 2021) publishes it in this form. On every level,
the finest would have three of four cells of every object, whatever its size.

Shapes: M boxes, L levels, H x W cells, A shapes of anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gdetkd_cli.detectors.compatibility import level_shapes
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.host import sent
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.fitnet import map_imitation_loss
from gdetkd_cli.methods.baselines.maps import MapTerm, boxes_in_cells, map_settings
from gdetkd_cli.structures import Regions


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


Assign = Callable[[Observation, Regions], Tensor]  # (R,) int64, the level that a detector assigns each region to


class GTMaskTerm(MapTerm):
    """Every level imitates the cells near objects; mean over all of these cells.

    Args:
        anchors: by student level, (A, 2) width and height in cells.
        share: of the best anchor's overlap with an object; see ``near_object_masks``.
        assign: the level of each object, for the cells inside its box instead; see ``inside_box_masks``.
    """

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        anchors: Sequence[Tensor],
        share: float,
        assign: Assign | None = None,
        counted: Sequence[bool] | None = None,
        same_space: bool = False,
    ) -> None:
        super().__init__(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            counted=counted,
            same_space=same_space,
        )
        self.anchors = anchors
        self.share = share
        self.assign = assign

    def forward(self, pair: ObservedPair) -> Tensor:
        masks = self._masks(pair)
        losses, counts = [], []
        for level in self.levels(pair):
            near = masks[level.number] & level.inside
            losses.append(map_imitation_loss(level.adapted, level.target, near))
            counts.append(near.sum())
        count = torch.stack(counts).float()
        return (torch.stack(losses) * count).sum() / count.sum().clamp(min=1)

    def _masks(self, pair: ObservedPair) -> dict[int, Tensor]:
        """By level that is compared, (N, H, W) bool: the cells near an object."""
        levels = [number for number, counts in enumerate(self.counted) if counts]
        maps = pair.student_seen.pyramid.maps
        shapes = [(maps[level].shape[-2], maps[level].shape[-1]) for level in levels]
        assigned = self._assigned(pair) if self.assign else None
        # By level, its place among those that are compared; a copy's objects belong to the level that it copies.
        place = sent((torch.tensor(self.counted).cumsum(dim=0) - 1).clamp(min=0), maps[0])
        by_image = []
        for image, boxes in enumerate(boxes_in_cells(pair)):
            chosen = [boxes[level] for level in levels]
            if assigned is None:
                anchors = [sent(self.anchors[level], maps[0]) for level in levels]
                by_image.append(near_object_masks(chosen, shapes, anchors, self.share))
            else:
                by_image.append(inside_box_masks(chosen, shapes, place[assigned[image]]))
        return {level: torch.stack([image[i] for image in by_image]) for i, level in enumerate(levels)}

    @torch.no_grad()
    def _assigned(self, pair: ObservedPair) -> list[Tensor]:
        """By image, (M,) the level of each object."""
        assert self.assign is not None
        boxes = [target.boxes for target in pair.batch.targets]
        index = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
        regions = Regions(torch.cat(boxes), index, torch.full_like(index, -1))
        return list(self.assign(pair.student_seen, regions).split([len(b) for b in boxes]))


def build(pair: Detectors, *, mask: Literal["anchors", "boxes"], share: float, pooled_levels: bool) -> GTMaskTerm:
    """The term of a pair; any pair has one."""
    return GTMaskTerm(
        **map_settings(pair, pooled_levels=pooled_levels),
        anchors=level_shapes(pair.student),
        share=share,
        assign=_assignment(pair.student) if mask == "boxes" else None,
        same_space=pair.same_space,
    )


def _assignment(detector: Detector) -> Assign:
    """The level that a detector assigns each region to, (R,)."""

    def assign(seen: Observation, regions: Regions) -> Tensor:
        level = detector.region_outputs(seen, regions, frozenset({"level"})).level
        assert level is not None
        return level

    return assign
