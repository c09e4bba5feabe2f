"""Region features from a pyramid, by measured geometry.

Shapes: N images, R regions, L levels, C channels, H x W cells; boxes xyxy in batch-image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import roi_align

from gdetkd_cli.host import copy_numbers, copy_tensor
from gdetkd_cli.structures import LevelSpec, Pyramid, Regions, count_by_image

# Side of a level's regions in its cells, at the middle of an octave. Two-stage detectors use 14 to 28 cells (from 224
# pixels on at stride 16). Dense ones use 4 to 8, if nothing more is known about them: these are RetinaNet's anchors.
TWO_STAGE_CELLS = 14 * 2**0.5
DENSE_CELLS = 4 * 2**0.5
POOLED_SIZE = 7  # bins per axis of a pooled region
SEPARABLE_CELLS = 4096  # 64 x 64 cells; on larger maps the matrix products cost more than RoIAlign's samples


def convert_to_cells(pixels: Tensor, level: LevelSpec) -> Tensor:
    """Converts (R, 4) xyxy from model pixels to continuous cells; the centre of cell (0, 0) is at (0.5, 0.5)."""
    (stride_y, stride_x), (offset_y, offset_x) = level.stride, level.offset
    stride = copy_numbers([stride_x, stride_y, stride_x, stride_y], pixels)
    offset = copy_numbers([offset_x, offset_y, offset_x, offset_y], pixels)
    return (pixels - offset) / stride + 0.5


def pool_level(pyramid: Pyramid, level: int, regions: Regions, *, size: int, sampling_ratio: int) -> Tensor:
    """RoIAlign on one level: (R, C_l, size, size), float32."""
    boxes = convert_to_cells(pyramid.frame.to_model(regions.boxes, regions.image_index), pyramid.levels[level])
    features = pyramid.maps[level].float()
    # Without a gradient there is no scattering backward, and torchvision's operator is faster.
    if features.requires_grad and features.shape[-2] * features.shape[-1] <= SEPARABLE_CELLS:
        return separable_roi_align(
            features,
            boxes,
            regions.image_index,
            size=size,
            sampling_ratio=sampling_ratio,
            counts=regions.count_by_image(len(features)),
        )
    rois = torch.cat([regions.image_index[:, None].to(boxes), boxes], dim=1)
    pooled: Tensor = roi_align(
        features, rois, (size, size), spatial_scale=1.0, sampling_ratio=sampling_ratio, aligned=True
    )
    return pooled


def separable_roi_align(
    features: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    *,
    size: int,
    sampling_ratio: int,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """RoIAlign as two matrix products, one per axis; equals torchvision's with ``aligned=True``.

    Bilinear sampling and averaging are separable, so a region is W_y F W_x^T. On small maps this is several times
    faster than the general operator, whose backward scatters one sample at a time. It is deterministic on CUDA.

    Args:
        features: (N, C, H, W) float32.
        boxes: (R, 4) xyxy in cells, see ``convert_to_cells``.
        image_index: (R,) non-decreasing.
        size: bins per axis.
        sampling_ratio: samples per bin and axis.
        counts: regions of each of the N images; None: count them.

    Returns:
        (R, C, size, size).
    """
    images, channels, height, width = features.shape
    along_y = _compute_bin_weights(boxes[:, 1], boxes[:, 3], height, size, sampling_ratio)  # (R, size, H)
    along_x = _compute_bin_weights(boxes[:, 0], boxes[:, 2], width, size, sampling_ratio)  # (R, size, W)
    rows_first = features.permute(0, 2, 3, 1).flatten(2)  # (N, H, W C)
    counts = count_by_image(image_index, images) if counts is None else list(counts)
    # Half precision would blur the position of a region; torchvision's operator also runs in float32.
    with torch.autocast(features.device.type, enabled=False):
        if len(set(counts)) == 1:  # the usual case takes one product
            rows = along_y.view(images, -1, height) @ rows_first
        else:
            pairs = zip(along_y.split(counts), rows_first.unbind(), strict=True)
            rows = torch.cat([y.flatten(0, 1) @ image for y, image in pairs])
        partly = rows.view(-1, size, width, channels)  # (R, bins y, W, C)
        return (along_x[:, None] @ partly).permute(0, 3, 1, 2)


def _compute_bin_weights(low: Tensor, high: Tensor, length: int, size: int, sampling_ratio: int) -> Tensor:
    """(R, size, length): the weight of each cell along one axis in each bin of the region [low, high]."""
    samples = size * sampling_ratio
    fraction = (torch.arange(samples, device=low.device) + 0.5) / samples
    position = low[:, None] + (high - low)[:, None] * fraction - 0.5  # (R, samples); cell centres are whole numbers
    inside = (position >= -1) & (position <= length)  # like RoIAlign: a sample further out counts as 0
    position = position.clamp(0, length - 1)
    index = torch.arange(length, device=low.device)
    weights = (1 - (position[:, :, None] - index).abs()).clamp(min=0) * inside[:, :, None]
    return weights.unflatten(1, (size, sampling_ratio)).mean(dim=2)


def pool_all_levels(pyramid: Pyramid, regions: Regions, *, size: int, sampling_ratio: int) -> list[Tensor]:
    """RoIAlign of every region on every level: L tensors (R, C_l, size, size)."""
    return [
        pool_level(pyramid, level, regions, size=size, sampling_ratio=sampling_ratio)
        for level in range(len(pyramid.levels))
    ]


def assign_levels(
    pyramid: Pyramid,
    regions: Regions,
    *,
    cells_per_side: float | Sequence[float],
    among: int | None = None,
    longest: bool = False,
) -> Tensor:
    """Assigns each region to a level, (R,) int64: the one where its side is nearest to ``cells_per_side``, in octaves.

    This is the usual rule k = k0 + log2(sqrt(area) / 224) for measured strides: 224 pixels at stride 16 are 14 cells.

    Args:
        regions: R of them.
        cells_per_side: usual side of a region on its level; one number, or one per level.
        among: choose from so many of the finest levels; None: from all.
        longest: a region's side is its longest one, not the root of its area.
    """
    pixels = pyramid.frame.to_model(regions.boxes, regions.image_index)
    sides = (pixels[:, 2:] - pixels[:, :2]).clamp(min=1e-3)
    side = sides.amax(dim=1) if longest else sides.prod(dim=1).sqrt()
    levels = pyramid.levels[:among]
    cells = [cells_per_side] * len(levels) if isinstance(cells_per_side, float | int) else cells_per_side
    strides = [(spec.stride[0] * spec.stride[1]) ** 0.5 for spec in levels]
    usual = copy_numbers([number * stride for number, stride in zip(cells, strides, strict=True)], pixels)
    return torch.log2(side[:, None] / usual).abs().argmin(dim=1)


def get_channels(levels: Sequence[LevelSpec], assignment: Tensor) -> Tensor | None:
    """(R,) channels of each region's level; None if all levels have the same number."""
    channels = [level.channels for level in levels]
    return copy_numbers(channels, assignment)[assignment] if len(set(channels)) > 1 else None


def pool_assigned(pyramid: Pyramid, regions: Regions, assignment: Tensor) -> Tensor:
    """RoIAlign of each region on its own level: (R, C, 7, 7).

    If levels differ in channels, C is their maximum and the others are padded with zeros.
    """
    channels = max(level.channels for level in pyramid.levels)
    if not len(regions):
        return pyramid.maps[0].new_zeros(0, channels, POOLED_SIZE, POOLED_SIZE, dtype=torch.float32)
    images = len(pyramid.maps[0])
    own = assignment.cpu()  # the only wait: the number of regions per level decides what is launched
    order = own.argsort(stable=True)
    image = torch.arange(images).repeat_interleave(torch.tensor(regions.count_by_image(images)))
    counts = torch.bincount(own * images + image, minlength=len(pyramid.levels) * images).view(-1, images).tolist()
    there = copy_tensor(order, assignment)
    boxes, index, candidate = regions.boxes[there], regions.image_index[there], regions.candidate[there]
    parts, start = [], 0
    for level, (spec, of_images) in enumerate(zip(pyramid.levels, counts, strict=True)):
        end = start + sum(of_images)
        if end > start:
            chosen = Regions(boxes[start:end], index[start:end], candidate[start:end], counts=tuple(of_images))
            part = pool_level(pyramid, level, chosen, size=POOLED_SIZE, sampling_ratio=2)
            parts.append(pad(part, (0, 0, 0, 0, 0, channels - spec.channels)))
        start = end
    return torch.cat(parts)[copy_tensor(order.argsort(), assignment)]
