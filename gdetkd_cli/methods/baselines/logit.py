"""Class predictions of dense heads: binary distillation in every cell (Yang et al., "Bridging Cross-task Protocol
Inconsistency for Distillation in Dense Object Detection", ICCV 2023, arXiv 2308.14286; its classification part).

Shapes: N images, C channels (anchors x classes), H x W cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gdetkd_cli.detectors.compatibility import compare_anchors, match_class_maps
from gdetkd_cli.detectors.protocol import View
from gdetkd_cli.errors import PairError
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.baselines.alignment import LevelPairing, align
from gdetkd_cli.methods.baselines.maps import list_image_sizes
from gdetkd_cli.structures import Pyramid


def class_map_loss(student: Tensor, teacher: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over cells and channels of |sigmoid(t) - sigmoid(s)| BCE(s, sigmoid(t)), and its normaliser.

    The factor keeps the many background cells on which both agree from dominating. The gradient passes through it, as
    in a focal loss.

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits.
        inside: (N, H, W) bool, the cells to compare.

    Returns:
        The sum of the losses, and the sum over cells of the teacher's greatest probability.
    """
    student, wanted = student.float(), teacher.detach().float().sigmoid()
    loss = binary_cross_entropy_with_logits(student, wanted, reduction="none") * (wanted - student.sigmoid()).abs()
    return (loss.sum(dim=1) * inside).sum(), (wanted.amax(dim=1) * inside).sum()


def _replace_maps(pyramid: Pyramid, maps: tuple[Tensor, ...]) -> Pyramid:
    """A pyramid of other maps with the same cells."""
    return Pyramid(maps=maps, levels=pyramid.levels, frame=pyramid.frame)


class LogitTerm(nn.Module):
    """Every cell's class logits imitate the teacher's; the sum is divided by the teacher's probabilities.

    Args:
        columns: (K + 1,) int64, the teacher's column for each of the student's.
        agree: (L_student, L_teacher) bool: whether two levels have the same anchors.
    """

    student_needs: frozenset[View] = frozenset({"class_maps"})
    teacher_needs: frozenset[View] = frozenset({"class_maps"})
    columns: Tensor

    def __init__(self, *, columns: Tensor, agree: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.agree = agree.tolist()
        self.pairing = LevelPairing(len(agree))

    def forward(self, pair: ObservedPair) -> Tensor:
        student, teacher = pair.student_view.class_maps, pair.teacher_view.class_maps
        assert student is not None and teacher is not None
        ordered = tuple(m.unflatten(1, (-1, len(self.columns)))[:, :, self.columns].flatten(1, 2) for m in teacher)
        ours, theirs = pair.student_seen.pyramid, pair.teacher_seen.pyramid
        aligned = align(
            _replace_maps(ours, student),
            _replace_maps(theirs, ordered),
            list_image_sizes(pair),
            self.pairing(ours, theirs),
        )
        for level, x in enumerate(aligned):
            if not self.agree[level][x.teacher_level]:
                raise PairError(
                    f"distill.logit: level {level + 1} of the student corresponds to the teacher's level "
                    f"{x.teacher_level + 1}, which has other anchors; give both detectors the same image size, or "
                    "leave the term out"
                )
        sums, normalisers = zip(*(class_map_loss(x.student, x.teacher, x.inside) for x in aligned), strict=True)
        return torch.stack(sums).sum() / torch.stack(normalisers).sum().clamp(min=1)


def build(pair: Detectors) -> LogitTerm:
    """Builds the term.

    Raises:
        PairError: the pair is not two RetinaNets or two FCOS with the same anchors and classes.
    """
    columns = match_class_maps(pair.student, pair.teacher)
    return LogitTerm(columns=columns, agree=compare_anchors(pair.student, pair.teacher))
