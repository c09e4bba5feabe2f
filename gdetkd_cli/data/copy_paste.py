"""Pastes copies of objects near them, somewhat larger or smaller.

After InstaBoost (Fang et al., ICCV 2019), which moves an object to nearby, similar surroundings. A moved object leaves
a hole to fill, so this version keeps the object and adds a copy.

Shapes: M objects, H x W pixels; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.nn.functional import interpolate

from gdetkd_cli.data.split import Outline

_SIZES = (0.8, 1.2)  # of the copy, relative to the object
_REACH = 1.5  # largest distance between the centres of object and copy along each axis, in sides of the object
_MAX_HIDDEN = 0.7  # an object is dropped if a copy hides a larger share of it
_FEATHER = 0.1  # width of the blended border of a box without an outline, as a fraction of its side


def paste_copies(
    image: Tensor, boxes: Tensor, labels: Tensor, outlines: Sequence[Outline], *, probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pastes a copy of each object with some probability, drawn from torch's global CPU generator.

    Args:
        image: (3, H, W) uint8; not changed.
        boxes: (M, 4) pixels, inside the image.
        labels: (M,).
        outlines: of the M objects, None for an object without one; empty if there are none.
        probability: of each copy.

    Returns:
        The image, the boxes of visible objects and of copies, and their labels.
    """
    original, image, found, names = image, image.clone(), list(boxes), list(labels)
    for i in range(len(boxes)):
        chance, size, dx, dy = torch.rand(4).tolist()
        if chance >= probability:
            continue
        # From the original, because an earlier copy may cover the object.
        pasted = _cut(original, boxes[i], outlines[i] if outlines else None, _SIZES[0] + size * (_SIZES[1] - _SIZES[0]))
        if pasted is None:
            continue
        pixels, alpha = pasted
        left, top = _place(boxes[i], (dx, dy), pixels.shape[-2:], image.shape[-2:])
        height, width = alpha.shape
        under = image[:, top : top + height, left : left + width]
        under.copy_((pixels * alpha + under * (1 - alpha)).round().to(torch.uint8))
        solid = alpha >= 0.5
        visible = [_compute_hidden_share(box, solid, left, top) <= _MAX_HIDDEN for box in found]
        rows, columns = solid.any(dim=1).nonzero(), solid.any(dim=0).nonzero()
        box = [left + columns[0, 0], top + rows[0, 0], left + columns[-1, 0] + 1, top + rows[-1, 0] + 1]
        found = [box for box, kept in zip(found, visible, strict=True) if kept] + [torch.tensor(box, dtype=boxes.dtype)]
        names = [name for name, kept in zip(names, visible, strict=True) if kept] + [labels[i]]
    return image, torch.stack(found) if found else boxes, torch.stack(names) if names else labels


def _cut(image: Tensor, box: Tensor, outline: Outline, scale: float) -> tuple[Tensor, Tensor] | None:
    """Cuts out an object and resizes it: pixels (3, h, w) float and opacity (h, w) in 0..1; None if too small."""
    left, top = (int(v) for v in box[:2].floor())
    right, bottom = (int(v) for v in box[2:].ceil())
    height, width = bottom - top, right - left
    room = min(scale, image.shape[-2] / height, image.shape[-1] / width)
    size = [int(height * room), int(width * room)]
    if min(size) < 2:
        return None
    alpha = (
        _feather(height, width) if outline is None else _draw_mask(outline, image.shape[-2:])[top:bottom, left:right]
    )
    crop = image[:, top:bottom, left:right].float()
    resized = interpolate(torch.cat([crop, alpha[None]])[None], size=size, mode="bilinear", align_corners=False)[0]
    return (resized[:3], resized[3]) if bool((resized[3] >= 0.5).any()) else None


def _draw_mask(outline: Outline, size: Sequence[int]) -> Tensor:
    """Draws an outline as a mask (H, W) in 0..1."""
    height, width = size
    if isinstance(outline, dict):
        runs = rle.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline
        return torch.from_numpy(rle.decode(runs)).float()
    # COCO's own drawing: Pillow's also fills the pixels after the right and the lower edge.
    polygons = rle.frPyObjects([polygon.tolist() for polygon in outline or ()], height, width)
    return torch.from_numpy(rle.decode(polygons).any(axis=2)).float()


def _feather(height: int, width: int) -> Tensor:
    """Returns the opacity (h, w) of a box: 1 inside, falling towards the edges."""
    ramps = []
    for side in (height, width):
        to_edge = torch.minimum(torch.arange(side) + 0.5, side - 0.5 - torch.arange(side))
        ramps.append((to_edge / max(_FEATHER * side, 1)).clamp(max=1))
    return ramps[0][:, None] * ramps[1][None]


def _place(box: Tensor, shift: tuple[float, float], size: Sequence[int], image: Sequence[int]) -> tuple[int, int]:
    """Returns (left, top) of a copy of ``size`` (h, w), near the object and inside the image."""
    x1, y1, x2, y2 = box.tolist()
    axes = ((x1, x2, shift[0], size[1], image[1]), (y1, y2, shift[1], size[0], image[0]))
    starts = []
    for low, high, share, side, end in axes:
        centre = (low + high) / 2 + (2 * share - 1) * _REACH * (high - low)
        starts.append(min(max(round(centre - side / 2), 0), end - side))
    return starts[0], starts[1]


def _compute_hidden_share(box: Tensor, solid: Tensor, left: int, top: int) -> float:
    """Returns the share of a box that a mask at (left, top) hides."""
    x1, y1, x2, y2 = (int(v) for v in box.round())
    inside = solid[max(y1 - top, 0) : max(y2 - top, 0), max(x1 - left, 0) : max(x2 - left, 0)]
    return float(inside.sum()) / max((x2 - x1) * (y2 - y1), 1)
