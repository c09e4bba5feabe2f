"""The distillation terms: each turns an observed pair into one unweighted scalar and owns its trainable parts.

Shapes: R regions, L levels, C channels, D embedding channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from gdetkd_cli.detectors.pooling import pool_all_levels
from gdetkd_cli.detectors.protocol import Observation, RegionView, StageView, View
from gdetkd_cli.distill.heads import LevelMatcher, Standardizer
from gdetkd_cli.distill.queue import RegionQueue
from gdetkd_cli.host import beside
from gdetkd_cli.losses.ckd import contrastive_loss, overlap_negatives
from gdetkd_cli.losses.prediction import box_loss, class_loss
from gdetkd_cli.losses.sgfi import imitation_loss, level_prior
from gdetkd_cli.structures import Batch, Pyramid, Regions


@dataclass(frozen=True)
class ObservedPair:
    """One step as both detectors saw it.

    Attributes:
        regions: R regions.
        image_ids: (R,) the data set's id of each region's picture.
        batch: the images and their truth.
        student_seen, teacher_seen: the forward of each; the teacher's without gradient.
        student_view, teacher_view: what each says of the regions; the teacher's without gradient.
    """

    regions: Regions
    image_ids: Tensor
    batch: Batch
    student_seen: Observation
    teacher_seen: Observation
    student_view: RegionView
    teacher_view: RegionView


class Term(Protocol):
    """One distillation loss. Implementations are nn.Modules.

    Attributes:
        student_needs, teacher_needs: what must be read of each region for it.
    """

    student_needs: frozenset[View]
    teacher_needs: frozenset[View]

    def __call__(self, pair: ObservedPair) -> Tensor: ...


class SGFITerm(nn.Module):
    """Semantic-guided feature imitation.

    Args:
        student_channels: channels of each student level.
        teacher_channels: C of the teacher's pooled features.
        embed_channels: channels of the embedding that levels are matched in.
        initial_tau: temperature of the match at the start.
        cosine: levels are matched by the angle between embeddings; or by their product (the paper).
        normalize: standardise the target ``channel`` by channel, as one ``scalar``, or not at all (``none``).
        prior: how much the match favours the student levels near ``centre``; 0: not at all (the paper).
        centre: the stride of the level that the student assigns a region to, or of the one that the teacher pools it
            from.
        sampling_ratio: RoIAlign samples per bin and axis on the student's levels.
        same_space: the student got the teacher's head, so its features have to become the teacher's own, not a linear
            map of them: they are standardised with the teacher's statistics and f_adapt starts as the identity.
    """

    student_needs: frozenset[View]
    teacher_needs: frozenset[View]

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: int,
        embed_channels: int,
        prior: float,
        centre: Literal["teacher", "student"] = "student",
        cosine: bool = True,
        initial_tau: float = 1.0,
        normalize: str,
        sampling_ratio: int,
        same_space: bool = False,
    ) -> None:
        super().__init__()
        self.matcher = LevelMatcher(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            embed_channels=embed_channels,
            initial_tau=initial_tau,
            identity=same_space,
            cosine=cosine,
        )
        self.same_space = same_space
        self.standardizer = (
            None if normalize == "none" else Standardizer(channels=teacher_channels, per_channel=normalize == "channel")
        )
        self.prior = prior
        self.centre = centre
        level: frozenset[View] = frozenset({"level"} if prior else ())
        pooled: frozenset[View] = frozenset({"pooled"})
        self.student_needs = level if centre == "student" else frozenset[View]()
        self.teacher_needs = pooled | level if centre == "teacher" else pooled
        self.sampling_ratio = sampling_ratio

    def forward(self, pair: ObservedPair) -> Tensor:
        target, channels = pair.teacher_view.pooled, pair.teacher_view.pooled_channels
        assert target is not None
        if self.standardizer is not None:
            self.standardizer.update(target, channels)
            target = self.standardizer(target.float(), channels)
        pyramid = pair.student_seen.pyramid
        levels = pool_all_levels(pyramid, pair.regions, size=target.shape[-1], sampling_ratio=self.sampling_ratio)
        prior = self._prior(pair)
        affine = self.standardizer.affine() if self.same_space and self.standardizer is not None else None
        # Standardisation is folded into the adapters' weights: half precision would lose a small deviation around a
        # large mean.
        with torch.autocast(target.device.type, enabled=False):
            imitation, _ = self.matcher(levels, target.float(), affine, prior)
        return imitation_loss(imitation.float(), target.float(), channels)

    def _prior(self, pair: ObservedPair) -> Tensor | None:
        """(R, L) logits that the match of each region starts from; None where it favours no level."""
        if self.prior == 0:
            return None
        index = pair.regions.image_index
        octaves = _octaves(pair.student_seen.pyramid, index)
        view, theirs = pair.student_view, octaves
        if self.centre == "teacher":
            view, theirs = pair.teacher_view, _octaves(pair.teacher_seen.pyramid, index)
        assert view.level is not None
        return level_prior(octaves, theirs.gather(1, view.level[:, None]).squeeze(1), self.prior)


def _octaves(pyramid: Pyramid, image_index: Tensor) -> Tensor:
    """(R, L) log2 of the stride of each level, in pixels of each region's image: the mean of both axes."""
    scale = pyramid.frame.scale
    strides = beside([log2(level.stride[0] * level.stride[1]) / 2 for level in pyramid.levels], scale)
    return strides - scale[image_index].log2().mean(dim=1, keepdim=True)


class CKDTerm(nn.Module):
    """Contrastive distillation over regions.

    f_s and f_t are one linear layer each into the common space: embeddings of unequal width cannot share one.

    Args:
        student_channels, teacher_channels: D of the two region embeddings.
        project_channels: channels of the common space.
        gamma: temperature.
        negative_iou: regions of one picture that overlap more are not negatives.
        queue: teacher embeddings remembered.
    """

    student_needs: frozenset[View] = frozenset({"embedding"})
    teacher_needs: frozenset[View] = frozenset({"embedding"})

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        project_channels: int,
        gamma: float,
        negative_iou: float,
        queue: int,
    ) -> None:
        super().__init__()
        self.project_student = nn.Linear(student_channels, project_channels)
        self.project_teacher = nn.Linear(teacher_channels, project_channels)
        self.queue = RegionQueue(size=queue, channels=teacher_channels)
        self.gamma = gamma
        self.negative_iou = negative_iou

    def forward(self, pair: ObservedPair) -> Tensor:
        student, teacher = pair.student_view.embedding, pair.teacher_view.embedding
        assert student is not None and teacher is not None
        remembered, remembered_ids = self.queue.rows()
        regions = pair.regions
        loss = contrastive_loss(
            self.project_student(student.float()),
            self.project_teacher(teacher.float()),
            gamma=self.gamma,
            negatives=overlap_negatives(box_iou(regions.boxes, regions.boxes), regions.image_index, self.negative_iou),
            memory=self.project_teacher(remembered),
            # A picture seen before was flipped or resized differently, so its boxes cannot be compared with this
            # step's: nothing of the same picture is a negative.
            memory_negatives=pair.image_ids[:, None] != remembered_ids[None, :],
        )
        self.queue.add(teacher, pair.image_ids)
        return loss


class _PredictionTerm(nn.Module):
    """What the two prediction terms share.

    Args:
        columns: (K + 1,) int64, the teacher's column for each of the student's.
        stage_weights: of the later stages of two cascades; empty for other pairs.
    """

    student_needs: frozenset[View] = frozenset({"predictions"})
    teacher_needs: frozenset[View] = frozenset({"predictions"})
    columns: Tensor

    def __init__(self, *, columns: Tensor, stage_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.stage_weights = tuple(stage_weights)

    def _over_stages(self, pair: ObservedPair, compare: Callable[[StageView, StageView], Tensor]) -> Tensor:
        """The first stage's loss, and those of a cascade's later stages by their weights in its own loss."""
        ours, theirs = (_first_stage(pair.regions, view) for view in (pair.student_view, pair.teacher_view))
        loss = compare(ours, self._in_order(theirs))
        if self.stage_weights:
            stages = zip(self.stage_weights, pair.student_view.later, pair.teacher_view.later, strict=True)
            for weight, ours, theirs in stages:
                loss = loss + weight * compare(ours, self._in_order(theirs))
        return loss

    def _in_order(self, stage: StageView) -> StageView:
        """What a stage of the teacher says, its classes in the student's order."""
        logits, deltas = stage.class_logits[:, self.columns], stage.box_deltas[:, self.columns]
        return StageView(boxes=stage.boxes, class_logits=logits, box_deltas=deltas)


class ClassTerm(_PredictionTerm):
    """L_cls: the teacher's class distribution on each region."""

    def forward(self, pair: ObservedPair) -> Tensor:
        return self._over_stages(pair, lambda ours, theirs: class_loss(ours.class_logits, theirs.class_logits))


class BoxTerm(_PredictionTerm):
    """L_reg: the teacher's boxes on each region, class by class."""

    def forward(self, pair: ObservedPair) -> Tensor:
        return self._over_stages(
            pair, lambda ours, theirs: box_loss(ours.box_deltas, theirs.box_deltas, theirs.class_logits)
        )


def _first_stage(regions: Regions, view: RegionView) -> StageView:
    assert view.class_logits is not None and view.box_deltas is not None
    return StageView(boxes=regions.boxes, class_logits=view.class_logits, box_deltas=view.box_deltas)


def needs_of(terms: Sequence[Term]) -> tuple[frozenset[View], frozenset[View]]:
    """What the terms together need of the student and of the teacher."""
    student: frozenset[View] = frozenset().union(*(term.student_needs for term in terms))
    teacher: frozenset[View] = frozenset().union(*(term.teacher_needs for term in terms))
    return student, teacher
