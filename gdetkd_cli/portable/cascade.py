"""The RoI heads of a Cascade R-CNN."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import clip_boxes_to_image


class CascadePredictor(nn.Module):
    """Class scores and one box for all classes, repeated per class to match the form of other heads."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, outputs)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.cls_score(x)
        return scores, self.bbox_pred(x).repeat(1, scores.shape[1])


class CascadeStage(RoIHeads):
    """A later stage of a cascade, with the parts of a RoI head."""

    def label_boxes(
        self, proposals: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Labels all boxes, without sampling: classes and deltas to their objects, by the stage's own coder."""
        truth = [t["boxes"].to(proposals[0].dtype) for t in targets]
        matched, labels = self.assign_targets_to_proposals(proposals, truth, [t["labels"] for t in targets])
        padded = [b if b.numel() > 0 else torch.zeros((1, 4), dtype=b.dtype, device=b.device) for b in truth]
        return labels, self.box_coder.encode([padded[i][matched[i]] for i in range(len(padded))], proposals)


class CascadeHeads(RoIHeads):
    """Three RoI heads in a row (Cai and Vasconcelos, "Cascade R-CNN", CVPR 2018).

    Each refines the boxes of the one before it and is trained with a higher overlap; probabilities are averaged. The
    first is the usual head of a Faster R-CNN; ``later`` are the others.
    """

    _LATER = ((0.6, (20.0, 20.0, 10.0, 10.0), 0.5), (0.7, (30.0, 30.0, 15.0, 15.0), 0.25))  # IoU, coder, loss weight

    def __init__(self, plain: RoIHeads, channels: int, hidden: int, num_classes: int) -> None:
        kept = (plain.score_thresh, plain.nms_thresh, plain.detections_per_img)
        sampling = (plain.fg_bg_sampler.batch_size_per_image, plain.fg_bg_sampler.positive_fraction)
        matching = (plain.proposal_matcher.high_threshold, plain.proposal_matcher.low_threshold)
        first = CascadePredictor(hidden, num_classes + 1)
        super().__init__(
            plain.box_roi_pool, plain.box_head, first, *matching, *sampling, plain.box_coder.weights, *kept
        )
        later = []
        for iou, coder, _ in self._LATER:
            parts = (TwoMLPHead(channels * 7**2, hidden), CascadePredictor(hidden, num_classes + 1))
            later.append(CascadeStage(copy.deepcopy(plain.box_roi_pool), *parts, iou, iou, *sampling, coder, *kept))
        self.later: Any = nn.ModuleList(later)
        self.later_weights = [weight for _, _, weight in self._LATER]
        # Postprocessing decodes the last boxes with the first head's coder.
        self.last_to_first = plain.box_coder.weights[0] / self._LATER[-1][1][0]

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        losses: dict[str, torch.Tensor] = {}
        labels: list[torch.Tensor] = []
        regression_targets: list[torch.Tensor] = []
        if self.training:
            proposals, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        probability = logits.softmax(dim=-1)
        if self.training:
            losses["loss_classifier"], losses["loss_box_reg"] = fastrcnn_loss(
                logits, deltas, labels, regression_targets
            )
        boxes = self.box_coder.decode_single(deltas[:, :4], torch.cat(proposals))
        for number, stage in enumerate(self.later):
            counts = [p.shape[0] for p in proposals]
            refined = boxes.detach().split(counts)
            proposals = [clip_boxes_to_image(refined[i], image_shapes[i]) for i in range(len(counts))]
            pooled = stage.box_roi_pool(features, proposals, image_shapes)
            logits, deltas = stage.box_predictor(stage.box_head(pooled))
            probability = probability + logits.softmax(dim=-1)
            if self.training and targets is not None:
                labels, regression_targets = stage.label_boxes(proposals, targets)
                scores, sides = fastrcnn_loss(logits, deltas, labels, regression_targets)
                losses[f"loss_classifier_{number + 2}"] = self.later_weights[number] * scores
                losses[f"loss_box_reg_{number + 2}"] = self.later_weights[number] * sides
            boxes = stage.box_coder.decode_single(deltas[:, :4], torch.cat(proposals))
        detections: list[dict[str, torch.Tensor]] = []
        if not self.training:
            mean = (probability / (1 + len(self.later))).log()
            all_boxes, all_scores, all_labels = self.postprocess_detections(
                mean, deltas * self.last_to_first, proposals, image_shapes
            )
            for i in range(len(all_boxes)):
                detections.append({"boxes": all_boxes[i], "labels": all_labels[i], "scores": all_scores[i]})
        return detections, losses
