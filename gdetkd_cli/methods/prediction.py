"""Prediction distillation between two RoI heads: classes and boxes (G-DetKD, arXiv 2108.07482).

Shapes: R regions, K classes; column 0 is background."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.functional import kl_div

from gdetkd_cli.detectors.compatibility import choose_stage_weights, match_predictions
from gdetkd_cli.detectors.protocol import RegionView, StageView, View
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.structures import Regions


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


def _get_first_stage(regions: Regions, view: RegionView) -> StageView:
    assert view.class_logits is not None and view.box_deltas is not None
    return StageView(boxes=regions.boxes, class_logits=view.class_logits, box_deltas=view.box_deltas)


def build_class_term(pair: Detectors) -> ClassTerm:
    """Builds the term; raises a PairError if the detectors have no RoI heads that can be compared."""
    return ClassTerm(
        columns=match_predictions(pair.student, pair.teacher),
        stage_weights=choose_stage_weights(pair.student, pair.teacher),
    )


def build_box_term(pair: Detectors) -> BoxTerm:
    """Builds the term; raises a PairError if the detectors have no RoI heads that can be compared."""
    return BoxTerm(
        columns=match_predictions(pair.student, pair.teacher),
        stage_weights=choose_stage_weights(pair.student, pair.teacher),
    )
