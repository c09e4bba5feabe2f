"""Prediction distillation between two RoI heads (G-DetKD, arXiv 2108.07482), or between two DETR-like decoders.

Shapes: R regions, K classes; column 0 of a RoI head is background."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div

from gdetkd_cli.detectors.compatibility import choose_stage_weights, match_predictions, match_queries
from gdetkd_cli.detectors.protocol import QueryView, RegionView, StageView, View
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.processes import compute_share
from gdetkd_cli.structures import Regions

_LEAST_OVERLAP = 0.5  # of a query's box and its region


def class_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_cls = KL(softmax(teacher) || softmax(student)), mean over regions.

    Args:
        student_logits: (R, K + 1).
        teacher_logits: (R, K + 1), same columns.
    """
    if not len(student_logits):
        return student_logits.sum() * 0.0
    return kl_div(
        student_logits.float().log_softmax(dim=1),
        teacher_logits.detach().float().log_softmax(dim=1),
        log_target=True,
        reduction="batchmean",
    )


def box_loss(student_deltas: Tensor, teacher_deltas: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_reg = 1/R sum_i |sum_c p_t^c (reg_t^c - reg_s^c)|: class-aware localisation.

    The background column is left out, since its deltas are never trained. The absolute value is taken per coordinate
    and summed over the four.

    Args:
        student_deltas: (R, K + 1, 4) in the box coding of both heads.
        teacher_deltas: (R, K + 1, 4).
        teacher_logits: (R, K + 1).
    """
    if not len(student_deltas):
        return student_deltas.sum() * 0.0
    probability = teacher_logits.detach().float().softmax(dim=1)[:, 1:, None]
    difference = teacher_deltas.detach().float()[:, 1:] - student_deltas.float()[:, 1:]
    return (probability * difference).sum(dim=1).abs().sum(dim=1).mean()


class _PredictionTerm(nn.Module):
    """Base of the two prediction terms.

    Args:
        columns: (K + 1,) int64, the teacher's column for each of the student's.
        stage_weights: loss weights of the later stages of two cascades; empty for other pairs.
    """

    student_needs: frozenset[View] = frozenset({"predictions"})
    teacher_needs: frozenset[View] = frozenset({"predictions"})
    columns: Tensor

    def __init__(self, *, columns: Tensor, stage_weights: Sequence[float] = ()) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.stage_weights = tuple(stage_weights)

    def _sum_stages(self, pair: ObservedPair, compare: Callable[[StageView, StageView], Tensor]) -> Tensor:
        """Sums the loss of the first stage and the weighted losses of a cascade's later stages."""
        ours, theirs = (_get_first_stage(pair.regions, view) for view in (pair.student_view, pair.teacher_view))
        loss = compare(ours, self._reorder_classes(theirs))
        if self.stage_weights:
            stages = zip(self.stage_weights, pair.student_view.later, pair.teacher_view.later, strict=True)
            for weight, ours, theirs in stages:
                loss = loss + weight * compare(ours, self._reorder_classes(theirs))
        return loss

    def _reorder_classes(self, stage: StageView) -> StageView:
        """Puts the classes of a teacher's stage into the student's order."""
        logits, deltas = stage.class_logits[:, self.columns], stage.box_deltas[:, self.columns]
        return StageView(boxes=stage.boxes, class_logits=logits, box_deltas=deltas)


class ClassTerm(_PredictionTerm):
    """L_cls: imitates the teacher's class distribution of each region."""

    def forward(self, pair: ObservedPair) -> Tensor:
        return self._sum_stages(pair, lambda ours, theirs: class_loss(ours.class_logits, theirs.class_logits))


class BoxTerm(_PredictionTerm):
    """L_reg: imitates the teacher's boxes of each region, class by class."""

    def forward(self, pair: ObservedPair) -> Tensor:
        return self._sum_stages(
            pair, lambda ours, theirs: box_loss(ours.box_deltas, theirs.box_deltas, theirs.class_logits)
        )


def query_class_loss(student_logits: Tensor, teacher_logits: Tensor, *, exclusive: bool) -> Tensor:
    """Imitates the class scores of the teacher's queries, mean over regions.

    Args:
        student_logits: (R, K), or (R, K + 1) with "no object" last.
        teacher_logits: same shape and columns.
        exclusive: KL(softmax(teacher) || softmax(student)); else the binary cross-entropy to the teacher's scores, less
            its minimum, summed over classes.
    """
    if exclusive or not len(student_logits):
        return class_loss(student_logits, teacher_logits)
    target = teacher_logits.detach().float().sigmoid()
    loss = binary_cross_entropy_with_logits(student_logits.float(), target, reduction="none")
    least = binary_cross_entropy_with_logits(teacher_logits.detach().float(), target, reduction="none")
    return (loss - least).sum(dim=1).mean()


def query_box_loss(student_boxes: Tensor, teacher_boxes: Tensor, score: Tensor) -> Tensor:
    """|teacher - student| summed over the four numbers, weighted by the teacher's best score, mean over regions.

    Args:
        student_boxes: (R, 4) centre and size, as fractions of the image.
        teacher_boxes: (R, 4).
        score: (R,) the teacher's greatest class score, in 0..1.
    """
    if not len(student_boxes):
        return student_boxes.sum() * 0.0
    return (score.detach() * (teacher_boxes.detach() - student_boxes).abs().sum(dim=1)).mean()


class _QueryTerm(nn.Module):
    """Base of the terms between two DETR-like decoders.

    Args:
        columns: the teacher's class column for each of the student's, "no object" last if classes exclude each other.
        exclusive: whether they do.
    """

    student_needs: frozenset[View] = frozenset({"predictions"})
    teacher_needs: frozenset[View] = frozenset({"predictions"})
    averages_some = True  # the regions whose queries match; see ``averages_regions``
    columns: Tensor

    def __init__(self, *, columns: Tensor, exclusive: bool) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.exclusive = exclusive

    def read(self, pair: ObservedPair) -> tuple[QueryView, QueryView]:
        """The matched queries of student and teacher, with the student's classes.

        A region's two queries are matched if both boxes overlap it by at least a half. Each query is matched once,
        where it overlaps most: nothing suppresses duplicates later, so two queries must not learn one object.
        """
        ours, theirs = pair.student_view.queries, pair.teacher_view.queries
        assert ours is not None and theirs is not None
        overlap = torch.minimum(ours.overlap, theirs.overlap)
        kept = overlap >= _LEAST_OVERLAP
        for rows in (theirs.rows, ours.rows):
            kept &= choose_once(rows, torch.where(kept, overlap, -1.0))
        chosen = kept.nonzero().squeeze(1)
        theirs = select_queries(theirs, chosen)
        return select_queries(ours, chosen), replace(theirs, class_logits=theirs.class_logits[:, self.columns])


def choose_once(rows: Tensor, overlap: Tensor) -> Tensor:
    """(R,) bool: for each value of ``rows`` (R,), the first place with the largest ``overlap`` (R,)."""
    same = rows[:, None] == rows
    best = overlap[None].masked_fill(~same, float("-inf")).amax(dim=1) == overlap
    earlier = torch.ones_like(same).tril(-1)
    return best & ~(same & best & earlier).any(dim=1)


def select_queries(view: QueryView, chosen: Tensor) -> QueryView:
    """The queries of some of the regions."""
    return QueryView(view.class_logits[chosen], view.boxes[chosen], view.rows[chosen], view.overlap[chosen])


class QueryClassTerm(_QueryTerm):
    """Imitates the classes of the teacher's queries."""

    def forward(self, pair: ObservedPair) -> Tensor:
        ours, theirs = self.read(pair)
        loss = query_class_loss(ours.class_logits, theirs.class_logits, exclusive=self.exclusive)
        return _average_over_processes(loss, len(ours.rows))


class QueryBoxTerm(_QueryTerm):
    """Imitates the boxes of the teacher's queries."""

    def forward(self, pair: ObservedPair) -> Tensor:
        ours, theirs = self.read(pair)
        logits = theirs.class_logits.float()
        scores = logits.softmax(dim=1)[:, :-1] if self.exclusive else logits.sigmoid()
        loss = query_box_loss(ours.boxes, theirs.boxes, scores.amax(dim=1))
        return _average_over_processes(loss, len(ours.rows))


def _average_over_processes(loss: Tensor, matched: int) -> Tensor:
    """Weights this process's mean over its matched regions, so that the processes' average is the mean over all."""
    share = compute_share(matched, loss.device)
    return loss if share is None else loss * share


def _get_first_stage(regions: Regions, view: RegionView) -> StageView:
    assert view.class_logits is not None and view.box_deltas is not None
    return StageView(boxes=regions.boxes, class_logits=view.class_logits, box_deltas=view.box_deltas)


def build_class_term(pair: Detectors) -> ClassTerm | QueryClassTerm:
    """Builds the term; raises a PairError if the detectors have no predictions that can be compared."""
    if pair.student.exclusive_classes is not None:
        columns = match_queries(pair.student, pair.teacher)
        return QueryClassTerm(columns=columns, exclusive=pair.student.exclusive_classes)
    return ClassTerm(
        columns=match_predictions(pair.student, pair.teacher),
        stage_weights=choose_stage_weights(pair.student, pair.teacher),
    )


def build_box_term(pair: Detectors) -> BoxTerm | QueryBoxTerm:
    """Builds the term; raises a PairError if the detectors have no predictions that can be compared."""
    if pair.student.exclusive_classes is not None:
        columns = match_queries(pair.student, pair.teacher)
        return QueryBoxTerm(columns=columns, exclusive=pair.student.exclusive_classes)
    return BoxTerm(
        columns=match_predictions(pair.student, pair.teacher),
        stage_weights=choose_stage_weights(pair.student, pair.teacher),
    )
