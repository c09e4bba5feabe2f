"""Contrastive distillation over regions (CKD; G-DetKD, arXiv 2108.07482).

Shapes: R regions of this process's batch, Q remembered rows, D channels of a region embedding or of the
common space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.ops import box_iou

from gdetkd_cli.detectors.protocol import View
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.methods.queue import RegionQueue


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float,
    negatives: Tensor,
    memory: Tensor | None = None,
    memory_negatives: Tensor | None = None,
) -> Tensor:
    """L_ckd = mean_i -log exp g(s_i, t_i) / sum over j in {i} and the negatives of exp g(s_i, t_j), g = cos / gamma.

    The positive stays in the denominator, so the loss is >= 0; it is 0 for a perfect match and far negatives.

    Args:
        student: (R, D) projected student embeddings.
        teacher: (R, D) projected teacher embeddings of the same regions.
        gamma: temperature.
        negatives: (R, R) bool, entry (i, j): teacher row j is a negative of region i. The diagonal is ignored.
        memory: (Q, D) projected teacher embeddings of earlier regions.
        memory_negatives: (R, Q) bool.
    """
    if not len(student):
        return student.sum() * 0.0 + teacher.sum() * 0.0
    # exp(1 / 0.07) overflows half precision, so the rest is float32.
    with torch.autocast(student.device.type, enabled=False):
        s = normalize(student.float(), dim=1)
        candidates = teacher.float() if memory is None else torch.cat([teacher.float(), memory.float()])
        logits = s @ normalize(candidates, dim=1).T / gamma  # (R, R + Q)
        itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
        kept = negatives | itself
        if memory_negatives is not None:
            kept = torch.cat([kept, memory_negatives], dim=1)
        positive = logits.diagonal()
        return (logits.masked_fill(~kept, float("-inf")).logsumexp(dim=1) - positive).mean()


def overlap_negatives(iou: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """(R, R) bool: region j is a negative of region i unless it is i or overlaps i in the same image.

    Args:
        iou: (R, R) intersection over union, also across images.
        image_index: (R,) image of each region.
        threshold: regions of one image with a larger overlap show the same object and are not negatives.
    """
    same_image = image_index[:, None] == image_index[None, :]
    negatives = ~(same_image & (iou > threshold))
    return negatives.fill_diagonal_(False)


class CKDTerm(nn.Module):
    """Contrastive distillation over regions.

    f_s and f_t are one linear layer each into the common space, since the embeddings may differ in width.

    Args:
        student_channels, teacher_channels: D of the two region embeddings.
        project_channels: channels of the common space.
        gamma: temperature.
        negative_iou: regions of one image with a larger overlap are not negatives.
        queue: number of remembered teacher embeddings.
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
        loss = contrastive_loss(
            self.project_student(student.float()),
            self.project_teacher(teacher.float()),
            gamma=self.gamma,
            negatives=self._find_negatives(pair),
            memory=self.project_teacher(remembered),
            # An earlier step may have flipped or resized the image differently, so its boxes cannot be compared with
            # this step's: regions of the same image are never negatives.
            memory_negatives=pair.image_ids[:, None] != remembered_ids[None, :],
        )
        self.queue.add(teacher, pair.image_ids)
        return loss

    @torch.no_grad()
    def compare_regions(self, pair: ObservedPair) -> tuple[Tensor, Tensor]:
        """Cosines in the common space: of each region with itself (R,), and of all pairs of negatives."""
        student, teacher = pair.student_view.embedding, pair.teacher_view.embedding
        assert student is not None and teacher is not None
        s = normalize(self.project_student(student.float()), dim=1)
        t = normalize(self.project_teacher(teacher.float()), dim=1)
        cosines = s @ t.T
        return cosines.diagonal(), cosines[self._find_negatives(pair)]

    def _find_negatives(self, pair: ObservedPair) -> Tensor:
        """(R, R) bool: whether region j is a negative of region i."""
        boxes, place, ids = pair.regions.boxes, pair.regions.image_index, pair.image_ids
        negatives = overlap_negatives(box_iou(boxes, boxes), place, self.negative_iou)
        # A batch may hold one image twice, where one pass over the data ends, in views whose boxes cannot be compared.
        return negatives & ((ids[:, None] != ids) | (place[:, None] == place))


def build(pair: Detectors, *, gamma: float, negative_iou: float, queue: int, project_channels: int) -> CKDTerm:
    """Builds the term; any pair allows it."""
    return CKDTerm(
        student_channels=pair.student.embedding_channels,
        teacher_channels=pair.teacher.embedding_channels,
        project_channels=project_channels,
        gamma=gamma,
        negative_iou=negative_iou,
        queue=queue,
    )
