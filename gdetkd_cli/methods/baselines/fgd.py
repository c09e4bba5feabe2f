"""Focal and global distillation (FGD; Yang et al., CVPR 2022), on one level of a pyramid.

Focal: the teacher's attention over cells and channels weights the imitation, separately for objects and background
(equations 4 to 8), and the student's attention imitates it (9). Global: the student also imitates each map's global
context (10 to 12). Sums over channels and cells, means over images, as published.

The published weights fit sums over 256 channels and images of 800 pixels. ``Scale`` brings other sums to that size.
With e the mean squared difference of the features:

- Attention over cells sums to the cells, attention over channels to C. Each has mean 1 and does not change the size.
- Objects: the cells of a box weigh 1 / (cells of the box), so the sum over them is a mean. It grows as C e per object.
- Background: the weights of its cells sum to 1. It grows as C e.
- Attention: |A_s - A_t| summed over cells grows as their number, summed over channels as C. Each has its own factor.
- Global: the squared difference summed over channels and cells grows as C times the cells times e.

Sums over channels get the factor 256 / C. Sums over cells get the cells of the published levels over the image's cells
on all compared levels, one factor for all levels. At the published strides this is the ratio of the images' areas, and
a pyramid that begins finer or coarser gives the same sum. Both factors are 1 at the published size. e is not scaled,
see ``FGDTerm``.

The image's cells are those ``inside``. Padding counts nowhere, so an image's losses do not depend on the others of its
batch.

Shapes: N images, C channels, H x W cells, M boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import PairError
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.maps import OUTSIDE, MapSettings, MapTerm, convert_boxes, read_map_settings

PUBLISHED_CHANNELS = 256


# Cells of the levels in the published settings, for a 4:3 image (most frequent in COCO) resized to 800 pixels on its
# short side and padded to multiples of 32: 800 x 1088. Strides 4 to 32, and 8 to 128.
TWO_STAGE_CELLS = 200 * 272 + 100 * 136 + 50 * 68 + 25 * 34
DENSE_CELLS = 100 * 136 + 50 * 68 + 25 * 34 + 13 * 17 + 7 * 9


@dataclass(frozen=True)
class Scale:
    """Factors for sums over channels and sums over cells; 1 and 1 give the published loss.

    Attributes:
        channels: for all images.
        cells: for all images, or (N,) by image.
    """

    channels: float = 1.0
    cells: float | Tensor = 1.0


def published_scale(channels: int, cells: float | Tensor, published_cells: int) -> Scale:
    """The factors that bring sums to the published size, so that the published weights apply.

    Args:
        channels: C of the compared maps.
        cells: of all compared levels together; one number, or (N,) by image.
        published_cells: ``TWO_STAGE_CELLS`` or ``DENSE_CELLS``.
    """
    return Scale(channels=PUBLISHED_CHANNELS / channels, cells=published_cells / cells)


def attention(maps: Tensor, inside: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Softmax of the mean absolute values, over cells and over channels.

    Args:
        maps: (N, C, H, W).
        inside: (N, H, W) bool, the image's cells.
        temperature: of both.

    Returns:
        (N, H, W) with the sum of the image's cells, 0 outside, and (N, C) with the sum C.
    """
    size, count = maps.abs() * inside[:, None], inside.sum(dim=(1, 2))
    logits = (size.mean(dim=1) / temperature).masked_fill(~inside, OUTSIDE)
    cells = logits.flatten(1).softmax(dim=1).view_as(logits) * count[:, None, None] * inside
    means = size.sum(dim=(2, 3)) / count.clamp(min=1)[:, None]
    return cells, (means / temperature).softmax(dim=1) * maps.shape[1]


def object_masks(boxes: Sequence[Tensor], inside: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (N, H, W) of objects and of background, 0 outside.

    A cell in a box weighs 1 / (cells of the box), in several boxes that of the smallest; a background cell weighs
    1 / (background cells of the image).

    Args:
        boxes: by image, (M, 4) xyxy in cells of the level.
        inside: (N, H, W) bool, the image's cells.
    """
    height, width = inside.shape[1:]
    objects = torch.zeros(inside.shape, device=inside.device)
    for mask, corners, own in zip(objects, boxes, inside, strict=True):
        if len(corners):
            columns = _mark_touched(corners[:, 0], corners[:, 2], width)[:, None, :]
            rows = _mark_touched(corners[:, 1], corners[:, 3], height)[:, :, None]
            cells = rows & columns & own
            mask.copy_((cells / cells.sum(dim=(1, 2), keepdim=True).clamp(min=1)).amax(dim=0))
    background = ((objects == 0) & inside).float()
    return objects, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _mark_touched(low: Tensor, high: Tensor, length: int) -> Tensor:
    """(M, length) bool: the cells along an axis that an interval touches; at least one."""
    first = low.floor().clamp(0, length - 1)
    end = torch.maximum(high.ceil(), first + 1)
    index = torch.arange(length, device=low.device)
    return (index >= first[:, None]) & (index < end[:, None])


def focal_losses(
    student: Tensor,
    teacher: Tensor,
    inside: Tensor,
    objects: Tensor,
    background: Tensor,
    temperature: float,
    scale: Scale = Scale(),
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of objects, background and attention.

    Args:
        student, teacher: (N, C, H, W).
        inside: (N, H, W) bool, the image's cells.
        objects, background: (N, H, W) weights, see ``object_masks``.
        temperature: of the attentions.
        scale: of the sums.
    """
    teacher = teacher.detach()
    (cells_s, channels_s), (cells_t, channels_t) = (attention(maps, inside, temperature) for maps in (student, teacher))
    error = ((student - teacher).square() * channels_t[:, :, None, None]).sum(dim=1) * cells_t  # (N, H, W)
    error = scale.channels * error
    attention_loss = scale.cells * (cells_s - cells_t).abs().sum(dim=(1, 2))  # (N,)
    attention_loss = attention_loss + scale.channels * (channels_s - channels_t).abs().sum(dim=1)
    images = len(student)
    return (error * objects).sum() / images, (error * background).sum() / images, attention_loss.mean()


class ContextBlock(nn.Module):
    """Adds GCNet's global context of the cells ``inside`` (N, H, W) to a map (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        last = self.transform[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # as published: the block adds 0 at the start
        nn.init.zeros_(last.bias)

    def forward(self, maps: Tensor, inside: Tensor) -> Tensor:
        weights = self.attend(maps).masked_fill(~inside[:, None], OUTSIDE).flatten(2).softmax(dim=2)  # (N, 1, HW)
        context = (maps.flatten(2) * weights).sum(dim=2)
        return maps + self.transform(context)[:, :, None, None]


def global_loss(
    student: Tensor,
    teacher: Tensor,
    inside: Tensor,
    student_block: ContextBlock,
    teacher_block: ContextBlock,
    scale: Scale = Scale(),
) -> Tensor:
    """Sum of the squared differences of both maps after their own context blocks; mean over images."""
    error = (student_block(student, inside) - teacher_block(teacher.detach(), inside)).square().sum(dim=1)
    return (scale.channels * scale.cells * (error * inside).sum(dim=(1, 2))).mean()


@dataclass(frozen=True)
class FGDWeights:
    """FGD's published temperature and weights of the four parts for a family of detectors."""

    temperature: float
    objects: float
    background: float
    attention: float
    relation: float


# github.com/yzd-v/FGD, configs/distillers/fgd: one set for Faster and Mask R-CNN, one for RetinaNet, GFL and SOLO, one
# for FCOS. RepPoints has FCOS's weights at temperature 0.5.
FGD_TWO_STAGE = FGDWeights(temperature=0.5, objects=5e-5, background=2.5e-5, attention=5e-5, relation=5e-7)
FGD_DENSE = FGDWeights(temperature=0.5, objects=1e-3, background=5e-4, attention=5e-4, relation=5e-6)
FGD_FCOS = FGDWeights(temperature=0.8, objects=1.6e-3, background=8e-4, attention=8e-4, relation=8e-6)


def published_weights(student: Detector) -> FGDWeights:
    """FGD's published weights for the student's family."""
    if student.family == "two-stage":
        return FGD_TWO_STAGE
    return FGD_FCOS if student.dense_head == "fcos" else FGD_DENSE


class FGDTerm(MapTerm):
    """Focal and global distillation; sum over levels, as published.

    The published weights belong to raw features. Squared differences grow with the square of the teacher's deviation,
    which differs by orders of magnitude between teachers. With standardised features, the parts equal the published
    ones for a teacher with deviation 1 on each level.

    Args:
        settings: of the pair; the teacher's levels have the same channels.
        weights: temperature of the attentions, and weights of the four parts.
        published_cells: scale sums to 256 channels and to this number of cells of all levels together (see the module);
            None: do not scale.
        standardized: standardise each of the teacher's levels to mean 0 and deviation 1.
    """

    def __init__(
        self,
        settings: MapSettings,
        *,
        weights: FGDWeights,
        published_cells: int | None,
        standardized: bool = True,
    ) -> None:
        super().__init__(settings, adapt=False, standardize="whole" if standardized else None)
        channels = settings.teacher_channels[0]
        self.student_blocks, self.teacher_blocks = (
            nn.ModuleList(ContextBlock(channels) if counts else nn.Identity() for counts in self.counted)
            for _ in range(2)
        )
        self.temperature = weights.temperature
        self.weights = (weights.objects, weights.background, weights.attention, weights.relation)
        self.published_cells = published_cells

    def forward(self, pair: ObservedPair) -> Tensor:
        boxes = convert_boxes(pair)
        levels = list(self.levels(pair))
        scale = Scale()
        if self.published_cells is not None:
            cells = torch.stack([level.inside.sum(dim=(1, 2)) for level in levels]).sum(dim=0).clamp(min=1)  # (N,)
            scale = published_scale(levels[0].target.shape[1], cells, self.published_cells)
        losses = []
        with torch.autocast(levels[0].inside.device.type, enabled=False):
            for level in levels:
                objects, background = object_masks([image[level.number] for image in boxes], level.inside)
                maps = level.adapted, level.target, level.inside
                parts = focal_losses(*maps, objects, background, self.temperature, scale)
                blocks = (self.student_blocks[level.number], self.teacher_blocks[level.number])
                relation = global_loss(*maps, *blocks, scale)  # type: ignore[arg-type]  # they are such blocks
                losses.append(sum(w * part for w, part in zip(self.weights, (*parts, relation), strict=True)))
        return torch.stack([torch.as_tensor(loss) for loss in losses]).sum()


def build(
    pair: Detectors,
    *,
    temperature: float | Literal["auto"],
    objects: float | Literal["auto"],
    background: float | Literal["auto"],
    attention: float | Literal["auto"],
    relation: float | Literal["auto"],
    sums: Literal["scaled", "published"],
    standardize: bool,
    pooled_levels: bool,
) -> FGDTerm:
    """Builds the term.

    Raises:
        PairError: the teacher's levels differ in channels.
    """
    theirs = pair.teacher_channels
    if len(set(theirs)) > 1:
        raise PairError(f"FGD needs a teacher with the same channels on all levels, but its levels have {theirs}")
    own = {
        "temperature": temperature,
        "objects": objects,
        "background": background,
        "attention": attention,
        "relation": relation,
    }
    published = published_weights(pair.student)
    weights = replace(published, **{name: value for name, value in own.items() if value != "auto"})
    cells = TWO_STAGE_CELLS if pair.student.family == "two-stage" else DENSE_CELLS
    return FGDTerm(
        read_map_settings(pair, pooled_levels=pooled_levels),
        weights=weights,
        published_cells=cells if sums == "scaled" else None,
        standardized=standardize,
    )
