"""Shared by the baselines over whole maps.

The teacher is standardised as in SGFI, so that no baseline fails because of the scale of its features: per channel, and
as a whole for FGD, which weights channels by their size. Maps are compared on the student's cells (``alignment``).
Student levels that only subsample another are left out: they have no weights of their own and would train the level
before a second time. Shapes: N images, M boxes, C channels, H x W cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.pooling import convert_to_cells
from gdetkd_cli.detectors.protocol import View
from gdetkd_cli.methods.adapters import RunningNormalizer
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.alignment import LevelPairing, align

OUTSIDE = torch.finfo(torch.float32).min  # the logit of a cell that a softmax leaves out


@dataclass(frozen=True)
class ComparedLevel:
    """A student level and the teacher's, both (N, C, H, W); ``inside``: (N, H, W) bool, the cells to compare."""

    number: int
    adapted: Tensor
    target: Tensor
    inside: Tensor


@dataclass(frozen=True)
class MapSettings:
    """What a term over whole maps reads from the pair.

    Attributes:
        student_channels, teacher_channels: channels of each level of both.
        counted: by student level, whether it is compared.
        same_space: see ``Detectors``; there is no adapter between equal channels then.
    """

    student_channels: Sequence[int]
    teacher_channels: Sequence[int]
    counted: Sequence[bool]
    same_space: bool = False


class MapTerm(nn.Module):
    """Base of the terms over whole maps.

    Args:
        settings: of the pair.
        adapt: use a 1 x 1 convolution on every student level; False: only if channels differ.
        standardize: the teacher's levels per ``channel``, as a ``whole``, or (None) not.
    """

    student_needs: frozenset[View] = frozenset()
    teacher_needs: frozenset[View] = frozenset()

    def __init__(
        self,
        settings: MapSettings,
        *,
        adapt: bool = True,
        standardize: Literal["channel", "whole"] | None = "channel",
    ) -> None:
        super().__init__()
        self.same_space = settings.same_space
        self.counted = tuple(settings.counted)
        self.pairing = LevelPairing(len(settings.student_channels))
        adapt = adapt and not self.same_space
        most = max(settings.teacher_channels)
        same = set(settings.teacher_channels) == {most}
        # A level that is not compared has no weights, since DistributedDataParallel would wait for their gradients.
        self.adapters = nn.ModuleList(
            nn.Conv2d(c, most, 1) if counts and (adapt or c != most or not same) else nn.Identity()
            for c, counts in zip(settings.student_channels, self.counted, strict=True)
        )
        self.normalizers = nn.ModuleList(
            RunningNormalizer(channels=c, per_channel=standardize == "channel") if standardize else nn.Identity()
            for c in settings.teacher_channels
        )

    def levels(self, pair: ObservedPair) -> Iterator[ComparedLevel]:
        """Yields the compared levels, aligned, adapted and standardised."""
        ours, theirs = pair.student_seen.pyramid, pair.teacher_seen.pyramid
        aligned = align(ours, theirs, list_image_sizes(pair), self.pairing(ours, theirs))
        for number, (level, adapter) in enumerate(zip(aligned, self.adapters, strict=True)):
            if not self.counted[number]:
                continue
            target, normalizer = level.teacher, self.normalizers[level.teacher_level]
            adapted = adapter(level.student)[:, : target.shape[1]].float()
            if isinstance(normalizer, RunningNormalizer):
                normalizer.update(target, inside=level.inside)
                target = normalizer(target)
                adapted = normalizer(adapted) if self.same_space else adapted
            yield ComparedLevel(number, adapted, target, level.inside)


def read_map_settings(pair: Detectors, *, pooled_levels: bool) -> MapSettings:
    """Reads the settings of a term over whole maps from the pair.

    Args:
        pair: the detectors.
        pooled_levels: also compare student levels that only subsample the one before.
    """
    counted = [pooled_levels or not level.subsampled for level in pair.student.levels]
    return MapSettings(pair.student_channels, pair.teacher_channels, counted, pair.same_space)


def list_image_sizes(pair: ObservedPair) -> list[tuple[int, int]]:
    """(height, width) of each batch image."""
    return [(image.shape[-2], image.shape[-1]) for image in pair.batch.images]


def convert_boxes(pair: ObservedPair) -> list[list[Tensor]]:
    """By image and student level, the image's objects (M, 4) xyxy in cells."""
    pyramid = pair.student_seen.pyramid
    boxes = []
    for image, target in enumerate(pair.batch.targets):
        index = torch.full((len(target.boxes),), image, device=target.boxes.device)
        pixels = pyramid.frame.to_model(target.boxes, index)
        boxes.append([convert_to_cells(pixels, level) for level in pyramid.levels])
    return boxes
