"""Imitation near objects: on cells with a fitting anchor, or on cells inside a box.

``near_object_masks`` follows fine-grained feature imitation (Wang et al., CVPR 2019). Every cell has an anchor of each
shape. It is selected for a box if one of its anchors overlaps the box by more than a share of the best anchor's
overlap. The paper has one map; here the best anchor of all levels sets the bar, which selects the levels of an
object's size.

``inside_box_masks`` selects the cells inside ground-truth boxes, each box on the level of its size. G-DetKD's table
names such a baseline "GT mask" without details; DeFeat (Guo et al., CVPR 2021) publishes it in this form. With boxes on
every level, three of four cells of each object would lie on the finest.

Shapes: N images, M boxes, L levels, R regions, C channels, H x W cells, A shapes of anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gdetkd_cli.detectors.compatibility import list_shapes
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.host import copy_tensor
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.fitnet import map_imitation_loss
from gdetkd_cli.methods.baselines.maps import MapSettings, MapTerm, convert_boxes, read_map_settings
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
    for objects, (height, width), sizes in zip(boxes, shapes, anchors, strict=True):
        rows, columns = (torch.arange(length, device=objects.device) + 0.5 for length in (height, width))
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1).flatten(0, 1)
        best = objects.new_zeros(height * width, len(objects))
        for half in 0.5 * sizes.to(centres):
            best = torch.maximum(best, _compute_overlaps(centres + torch.cat([-half, half]), objects))
        overlaps.append(best)
    bar = share * torch.stack([level.amax(dim=0) for level in overlaps]).amax(dim=0)
    return [((level > bar) & (level > 0)).any(dim=1).view(shape) for level, shape in zip(overlaps, shapes, strict=True)]


def inside_box_masks(boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]], assigned: Tensor) -> list[Tensor]:
    """By level, (H, W) bool: the cells with their centre in a box of the level.

    The cell that contains the centre of a box is always included.

    Args:
        boxes: by level, (M, 4) the same objects, xyxy in that level's cells (the centre of cell (0, 0) is (0.5, 0.5)).
        shapes: by level, (H, W).
        assigned: (M,) int64, the level of each object; objects of other levels are ignored.
    """
    masks = []
    for level, (objects, (height, width)) in enumerate(zip(boxes, shapes, strict=True)):
        own = (assigned == level)[:, None]
        columns = _mark_covered(objects[:, 0], objects[:, 2], width) & own
        rows = _mark_covered(objects[:, 1], objects[:, 3], height)
        masks.append((rows[:, :, None] & columns[:, None, :]).any(dim=0))
    return masks


def _mark_covered(low: Tensor, high: Tensor, length: int) -> Tensor:
    """(M, length) bool: the cells along an axis with their centre in an interval, and the cell of its middle."""
    index = torch.arange(length, device=low.device)
    centres = index + 0.5
    inside = (centres >= low[:, None]) & (centres <= high[:, None])
    middle = ((low + high) / 2).floor().clamp(0, length - 1)
    return inside | (index == middle[:, None])


def _compute_overlaps(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of every anchor (A, 4) with every box (M, 4): (A, M)."""
    low, high = torch.maximum(anchors[:, None, :2], boxes[:, :2]), torch.minimum(anchors[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas, sizes = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (anchors, boxes))
    return shared / (areas[:, None] + sizes - shared)


Assign = Callable[[Observation, Regions], Tensor]  # -> (R,) int64, each region's level


class GTMaskTerm(MapTerm):
    """Every level imitates the cells near objects; mean over these cells.

    Args:
        settings: of the pair.
        anchors: by student level, (A, 2) width and height in cells.
        share: of the best anchor's overlap with an object; see ``near_object_masks``.
        assign: assigns objects to levels, for ``inside_box_masks``; None: use ``near_object_masks``.
    """

    def __init__(
        self, settings: MapSettings, *, anchors: Sequence[Tensor], share: float, assign: Assign | None = None
    ) -> None:
        super().__init__(settings)
        self.anchors = anchors
        self.share = share
        self.assign = assign

    def forward(self, pair: ObservedPair) -> Tensor:
        masks = self.build_masks(pair)
        losses, counts = [], []
        for level in self.levels(pair):
            near = masks[level.number] & level.inside
            losses.append(map_imitation_loss(level.adapted, level.target, near))
            counts.append(near.sum())
        count = torch.stack(counts).float()
        return (torch.stack(losses) * count).sum() / count.sum().clamp(min=1)

    def build_masks(self, pair: ObservedPair) -> dict[int, Tensor]:
        """By compared level, (N, H, W) bool: the cells near an object."""
        levels = [number for number, counts in enumerate(self.counted) if counts]
        maps = pair.student_seen.pyramid.maps
        shapes = [(maps[level].shape[-2], maps[level].shape[-1]) for level in levels]
        assigned = self._assign_objects(pair) if self.assign else None
        # By level, its place among the compared levels; objects of a subsampled level belong to the one before it.
        place = copy_tensor((torch.tensor(self.counted).cumsum(dim=0) - 1).clamp(min=0), maps[0])
        by_image = []
        for image, boxes in enumerate(convert_boxes(pair)):
            chosen = [boxes[level] for level in levels]
            if assigned is None:
                anchors = [copy_tensor(self.anchors[level], maps[0]) for level in levels]
                by_image.append(near_object_masks(chosen, shapes, anchors, self.share))
            else:
                by_image.append(inside_box_masks(chosen, shapes, place[assigned[image]]))
        return {level: torch.stack([image[i] for image in by_image]) for i, level in enumerate(levels)}

    @torch.no_grad()
    def _assign_objects(self, pair: ObservedPair) -> list[Tensor]:
        """By image, (M,) the level of each object."""
        assert self.assign is not None
        boxes = [target.boxes for target in pair.batch.targets]
        index = torch.cat([torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)])
        regions = Regions(torch.cat(boxes), index, torch.full_like(index, -1))
        return list(self.assign(pair.student_seen, regions).split([len(b) for b in boxes]))


def build(pair: Detectors, *, mask: Literal["anchors", "boxes"], share: float, pooled_levels: bool) -> GTMaskTerm:
    """Builds the term; any pair allows it."""
    return GTMaskTerm(
        read_map_settings(pair, pooled_levels=pooled_levels),
        anchors=list_shapes(pair.student),
        share=share,
        assign=_build_assign(pair.student) if mask == "boxes" else None,
    )


def _build_assign(detector: Detector) -> Assign:
    """Builds the function that returns a detector's level of each region."""

    def assign(seen: Observation, regions: Regions) -> Tensor:
        level = detector.region_outputs(seen, regions, frozenset({"level"})).level
        assert level is not None
        return level

    return assign
