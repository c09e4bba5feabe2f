"""Terms of other methods, to be compared with: each imitates the teacher's maps, or its regions, in its own way.

They get the teacher standardised as SGFI does, so that none fails for its features' scale alone: by channel, and for
FGD, which attends to some channels more than to others, as a whole. Maps are compared on the student's cells
(``alignment``). Levels of the student that only subsample another are left out: they have no weights of their own, so
what they are taught is taught to the level before, a second time. Shapes: N images, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gdetkd_cli.detectors.pooling import cells
from gdetkd_cli.detectors.protocol import Observation, View
from gdetkd_cli.distill.alignment import align
from gdetkd_cli.distill.heads import Standardizer, folded, new_adapter
from gdetkd_cli.distill.terms import ObservedPair
from gdetkd_cli.errors import PairError
from gdetkd_cli.host import sent
from gdetkd_cli.losses.cwd import channel_divergence
from gdetkd_cli.losses.fgd import ContextBlock, Scale, focal_losses, global_loss, object_masks, published_scale
from gdetkd_cli.losses.fitnet import map_imitation_loss
from gdetkd_cli.losses.gt_mask import inside_box_masks, near_object_masks
from gdetkd_cli.losses.logit import class_map_loss
from gdetkd_cli.losses.pkd import pearson_loss
from gdetkd_cli.losses.roi_imitation import region_imitation_loss
from gdetkd_cli.structures import Pyramid, Regions

Assign = Callable[[Observation, Regions], Tensor]  # (R,) int64, the level that a detector assigns each region to


@dataclass(frozen=True)
class _Level:
    """One level of the student beside the teacher's, both (N, C, H, W); ``inside``: (N, H, W) bool, cells of images."""

    number: int
    adapted: Tensor
    target: Tensor
    inside: Tensor


class _MapTerm(nn.Module):
    """What terms over whole maps share.

    Args:
        student_channels, teacher_channels: channels of each level of both.
        counted: by student level, whether it is compared; None: all are.
        adapt: a 1 x 1 convolution on every student level, or only where channels differ.
        standardize: the teacher's levels, per ``channel``, as a ``whole``, or not.
        same_space: as in SGFITerm: the student got the teacher's head, so nothing may stand between their features.
    """

    student_needs: frozenset[View] = frozenset()
    teacher_needs: frozenset[View] = frozenset()

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        counted: Sequence[bool] | None = None,
        adapt: bool = True,
        standardize: Literal["channel", "whole"] | None = "channel",
        same_space: bool = False,
    ) -> None:
        super().__init__()
        self.same_space = same_space
        adapt = adapt and not same_space
        most = max(teacher_channels)
        same = set(teacher_channels) == {most}
        self.counted = tuple(counted) if counted is not None else (True,) * len(student_channels)
        # A level that is not compared has no weights: DistributedDataParallel would wait for their gradients.
        self.adapters = nn.ModuleList(
            nn.Conv2d(c, most, 1) if counts and (adapt or c != most or not same) else nn.Identity()
            for c, counts in zip(student_channels, self.counted, strict=True)
        )
        self.standardizers = nn.ModuleList(
            Standardizer(channels=c, per_channel=standardize == "channel") if standardize else nn.Identity()
            for c in teacher_channels
        )

    def levels(self, pair: ObservedPair) -> Iterator[_Level]:
        """The pair's levels that are compared, aligned, adapted and standardised."""
        aligned = align(pair.student_seen.pyramid, pair.teacher_seen.pyramid, _sizes(pair))
        for number, (level, adapter) in enumerate(zip(aligned, self.adapters, strict=True)):
            if not self.counted[number]:
                continue
            target, standardizer = level.teacher, self.standardizers[level.teacher_level]
            adapted = adapter(level.student)[:, : target.shape[1]].float()
            if isinstance(standardizer, Standardizer):
                standardizer.update(target, inside=level.inside)
                target = standardizer(target)
                adapted = standardizer(adapted) if self.same_space else adapted
            yield _Level(number, adapted, target, level.inside)


class FitNetTerm(_MapTerm):
    """Every level imitates the whole map; mean over levels."""

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [map_imitation_loss(level.adapted, level.target, level.inside) for level in self.levels(pair)]
        return torch.stack(losses).mean()


class GTMaskTerm(_MapTerm):
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
        for image, boxes in enumerate(_boxes_in_cells(pair)):
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


class PKDTerm(_MapTerm):
    """Every level correlates with the teacher's, channel by channel; sum over levels, as published."""

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        counted: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            counted=counted,
            adapt=False,
            standardize=None,
        )

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [pearson_loss(level.adapted, level.target, level.inside) for level in self.levels(pair)]
        return torch.stack(losses).sum()


class CWDTerm(_MapTerm):
    """Every channel of every level looks where the teacher's does; sum over levels, as published.

    Args:
        tau: temperature of the softmax over cells.
    """

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        tau: float,
        counted: Sequence[bool] | None = None,
        same_space: bool = False,
    ) -> None:
        super().__init__(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            counted=counted,
            adapt=False,
            same_space=same_space,
        )
        self.tau = tau

    def forward(self, pair: ObservedPair) -> Tensor:
        losses = [
            channel_divergence(level.adapted, level.target, level.inside, self.tau) for level in self.levels(pair)
        ]
        return torch.stack(losses).sum()


class FGDTerm(_MapTerm):
    """Focal and global distillation; sum over levels, as published.

    The published weights are for features as they are. Squared differences grow with the square of the teacher's
    deviation, which no weight here can follow: it differs by orders of magnitude between teachers. Standardised, the
    parts are what the published ones are for a teacher whose levels have deviation 1.

    Args:
        temperature: of the attentions.
        objects, background, attention, relation: weights of the four parts.
        published_cells: sums over channels and cells are brought to 256 channels and to so many cells of all levels
            together (see ``losses.fgd``); None: they are left as they are.
        standardized: each of the teacher's levels has mean 0 and deviation 1; or its features are as they are.
    """

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        temperature: float,
        objects: float,
        background: float,
        attention: float,
        relation: float,
        published_cells: int | None,
        standardized: bool = True,
        counted: Sequence[bool] | None = None,
        same_space: bool = False,
    ) -> None:
        super().__init__(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            counted=counted,
            adapt=False,
            standardize="whole" if standardized else None,
            same_space=same_space,
        )
        most = max(teacher_channels)
        self.student_blocks, self.teacher_blocks = (
            nn.ModuleList(ContextBlock(most) if counts else nn.Identity() for counts in self.counted) for _ in range(2)
        )
        if set(teacher_channels) != {most}:
            raise ValueError("FGD's context blocks need a teacher whose levels have the same channels")
        self.temperature = temperature
        self.weights = (objects, background, attention, relation)
        self.published_cells = published_cells

    def forward(self, pair: ObservedPair) -> Tensor:
        boxes = _boxes_in_cells(pair)
        levels = list(self.levels(pair))
        scale = Scale()
        if self.published_cells is not None:
            cells = sum(level.inside[0].numel() for level in levels)
            scale = published_scale(levels[0].target.shape[1], cells, self.published_cells)
        losses = []
        for level in levels:
            objects, background = object_masks(
                [image[level.number] for image in boxes], (level.target.shape[-2], level.target.shape[-1])
            )
            inside = level.inside.float()
            # Beyond the images both are 0: neither the attentions nor the context are taught what padding looks like.
            ours, theirs = (maps * inside[:, None] for maps in (level.adapted, level.target))
            parts = focal_losses(ours, theirs, objects * inside, background * inside, self.temperature, scale)
            blocks = (self.student_blocks[level.number], self.teacher_blocks[level.number])
            relation = global_loss(ours, theirs, *blocks, scale)  # type: ignore[arg-type]  # they are such blocks
            losses.append(sum(w * part for w, part in zip(self.weights, (*parts, relation), strict=True)))
        return torch.stack([torch.as_tensor(loss) for loss in losses]).sum()


class RoIImitationTerm(nn.Module):
    """Regions imitate the teacher's, each pooled from the level that its own detector assigns it to.

    Args:
        student_channels: most channels of a student level.
        teacher_channels: most channels of a teacher level.
        same_space: as in SGFITerm: the student got the teacher's head.
    """

    student_needs: frozenset[View] = frozenset({"pooled"})
    teacher_needs: frozenset[View] = frozenset({"pooled"})

    def __init__(self, *, student_channels: int, teacher_channels: int, same_space: bool = False) -> None:
        super().__init__()
        self.adapter = new_adapter(student_channels, teacher_channels, same_space)
        self.same_space = same_space
        self.standardizer = Standardizer(channels=teacher_channels, per_channel=True)

    def forward(self, pair: ObservedPair) -> Tensor:
        student, target = pair.student_view.pooled, pair.teacher_view.pooled
        channels = pair.teacher_view.pooled_channels
        assert student is not None and target is not None
        self.standardizer.update(target, channels)
        target = self.standardizer(target.float(), channels)
        affine = self.standardizer.affine() if self.same_space else None
        with torch.autocast(target.device.type, enabled=False):
            adapted = conv2d(student.float(), *folded(self.adapter, affine))
        return region_imitation_loss(adapted, target, channels)


class LogitTerm(nn.Module):
    """Every cell's class logits imitate the teacher's; over all of them by what the teacher sees.

    Args:
        columns: (K + 1,) int64, the teacher's column for each of the student's.
        agree: (L_student, L_teacher) bool, which levels have the same anchors.
    """

    student_needs: frozenset[View] = frozenset({"class_maps"})
    teacher_needs: frozenset[View] = frozenset({"class_maps"})
    columns: Tensor

    def __init__(self, *, columns: Tensor, agree: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.agree = agree.tolist()

    def forward(self, pair: ObservedPair) -> Tensor:
        student, teacher = pair.student_view.class_maps, pair.teacher_view.class_maps
        assert student is not None and teacher is not None
        ordered = tuple(m.unflatten(1, (-1, len(self.columns)))[:, :, self.columns].flatten(1, 2) for m in teacher)
        aligned = align(
            _over(pair.student_seen.pyramid, student), _over(pair.teacher_seen.pyramid, ordered), _sizes(pair)
        )
        for level, x in enumerate(aligned):
            if not self.agree[level][x.teacher_level]:
                raise PairError(
                    f"distill.logit: level {level + 1} of the student lies on the teacher's {x.teacher_level + 1}, "
                    "which has other anchors; give both detectors one image size, or leave the term out"
                )
        sums, seen = zip(*(class_map_loss(x.student, x.teacher, x.inside) for x in aligned), strict=True)
        return torch.stack(sums).sum() / torch.stack(seen).sum().clamp(min=1)


def _over(pyramid: Pyramid, maps: tuple[Tensor, ...]) -> Pyramid:
    """Other maps on the same cells."""
    return Pyramid(maps=maps, levels=pyramid.levels, frame=pyramid.frame)


def _sizes(pair: ObservedPair) -> list[tuple[int, int]]:
    """(height, width) of each batch image."""
    return [(image.shape[-2], image.shape[-1]) for image in pair.batch.images]


def _boxes_in_cells(pair: ObservedPair) -> list[list[Tensor]]:
    """By image and student level, its objects (M, 4) xyxy in cells."""
    pyramid = pair.student_seen.pyramid
    found = []
    for image, target in enumerate(pair.batch.targets):
        index = torch.full((len(target.boxes),), image, device=target.boxes.device)
        pixels = pyramid.frame.to_model(target.boxes, index)
        found.append([cells(pixels, level) for level in pyramid.levels])
    return found
