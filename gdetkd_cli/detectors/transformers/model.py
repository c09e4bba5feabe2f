"""A detector of transformers behind the calls of torchvision's detectors.

It relies on the interface of ``AutoModelForObjectDetection`` alone: ``pixel_values``, ``pixel_mask`` and ``labels`` in;
``loss``, ``logits``, ``pred_boxes`` and ``last_hidden_state`` out.

Shapes: N images, Q queries, K classes, D channels, M boxes.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from gdetkd_cli.detectors.transformers.preparation import Preparation

_MOST = 300  # detections per image, as transformers' own post-processing of RT-DETR


class QueryModel(nn.Module):
    """In training, (images, targets) -> the model's own loss; in evaluation, images -> boxes, scores and labels."""

    def __init__(self, model: Any, preparation: Preparation) -> None:
        super().__init__()
        self.model = model
        self.preparation = preparation
        # Limits of the output: no score is too low, and only the best are returned.
        self.score_thresh, self.detections_per_img = -1.0, _MOST
        self._takes_mask = "pixel_mask" in inspect.signature(model.forward).parameters

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Runs the model on images (3, H_i, W_i) in 0..1; labels count from 1."""
        prepared = self.preparation(images)
        given: dict[str, Any] = {"pixel_values": prepared.pixels}
        if self._takes_mask and prepared.is_padded:
            given["pixel_mask"] = prepared.mask
        if targets is not None:
            given["labels"] = [
                convert_target(target, image.shape[-2], image.shape[-1])
                for target, image in zip(targets, images, strict=True)
            ]
        output = self.model(**given)
        if targets is not None:
            # The parts in ``loss_dict`` are weighted in some models and not in others; ``loss`` is their sum in all.
            return {"loss": output.loss}
        return [
            self._decode(logits, boxes, image.shape[-2], image.shape[-1])
            for logits, boxes, image in zip(output.logits, output.pred_boxes, images, strict=True)
        ]

    def compute_scores(self, logits: Tensor) -> Tensor:
        """Converts logits (..., Q, K or K + 1) to the scores (..., Q, K) of the classes.

        One column more than there are classes is "no object", and then the classes exclude each other.
        """
        if logits.shape[-1] == self.model.config.num_labels + 1:
            return logits.softmax(dim=-1)[..., :-1]
        return logits.sigmoid()

    def detect_batch(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detects in images of one size; for a traced file, so without loops over images.

        Args:
            images: (N, 3, H, W) in 0..1.

        Returns:
            boxes (N, D, 4) xyxy pixels of the images, scores (N, D) by descending score, and labels (N, D) from 1.
        """
        output = self.model(pixel_values=self.preparation.prepare(images))
        scores = self.compute_scores(output.logits)
        queries, classes = scores.shape[1:]
        best = scores.flatten(1).topk(min(_MOST, queries * classes))
        rows = (best.indices // classes)[..., None].expand(-1, -1, 4)
        boxes = convert_boxes(output.pred_boxes.gather(1, rows), images.shape[-2], images.shape[-1])
        return boxes, best.values, best.indices % classes + 1

    def _decode(self, logits: Tensor, boxes: Tensor, height: int, width: int) -> dict[str, Tensor]:
        """The best-scored pairs of query and class of one image, by descending score."""
        scores = self.compute_scores(logits)
        classes = scores.shape[1]
        best = scores.flatten().topk(min(_MOST, scores.shape[0] * classes))
        corners = convert_boxes(boxes[best.indices // classes], height, width)
        return {"boxes": corners, "scores": best.values, "labels": best.indices % classes + 1}


def fix_positions(module: QueryModel) -> None:
    """Makes constants of the position embeddings that a body interpolates, if all images get one size.

    Some bodies (RF-DETR) interpolate them by an operator that ONNX lacks, whenever they are traced.
    """
    height, width = module.preparation.height, module.preparation.width
    bodies: list[Any] = [layer for layer in module.modules() if hasattr(layer, "interpolate_pos_encoding")]
    if height is None or width is None or not bodies:
        return
    found: dict[Any, Tensor] = {}

    def keep(body: Any, interpolate: Any, *arguments: Any) -> Tensor:
        return found.setdefault(body, interpolate(*arguments))

    for body in bodies:
        body.interpolate_pos_encoding = partial(keep, body, body.interpolate_pos_encoding)
    with torch.no_grad():
        module([torch.zeros(3, height, width)])
    for body in bodies:
        body.interpolate_pos_encoding = partial(lambda value, *_: value, found[body])


def convert_target(target: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Converts an image's ground truth to the form that transformers' losses take: centre and size in 0..1."""
    sides = target["boxes"].new_tensor([width, height]).repeat(2)
    boxes = box_convert(target["boxes"] / sides, "xyxy", "cxcywh")
    return {"class_labels": target["labels"] - 1, "boxes": boxes}


def convert_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Converts boxes (..., 4) from centre and size in 0..1 to xyxy pixels of the image, clipped."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat([centre - half, centre + half], dim=-1).clamp(0, 1)
    scale = torch.stack([torch.as_tensor(side, dtype=boxes.dtype) for side in (width, height, width, height)])
    return corners * scale.to(boxes.device)
