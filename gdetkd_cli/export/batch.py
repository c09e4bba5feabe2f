"""The modules of exported files that take several images of one size.

Shapes: N images, H x W pixels, D detections of the image that has the most, Q queries, K classes; boxes xyxy, pixels of
the input images. Behind an image's own detections, boxes, scores and labels are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.transformers.model import QueryModel
from gdetkd_cli.export.single_image import SingleImage

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""boxes (N, D, 4), scores (N, D), labels (N, D) and counts (N,)."""


class ImageBatch(nn.Module):
    """A copy of a detector that takes a fixed number of images and can be traced.

    The network runs once for all images. What follows it, such as NMS, is traced once for each image.
    """

    def __init__(self, detector: Detector, images: int) -> None:
        super().__init__()
        self.detector = SingleImage(detector).detector
        self.images = images

    def forward(self, images: Tensor) -> Outputs:
        """(N, 3, H, W) in 0..1 -> the padded detections."""
        found = self.detector([images[place] for place in range(self.images)])
        objects = [one["labels"] > 0 for one in found]  # like Detector.predict: 0 is background
        counts = torch.stack([kept.sum() for kept in objects])
        boxes, scores, labels = (
            torch.stack([_pad(one[name][kept], counts) for one, kept in zip(found, objects, strict=True)])
            for name in ("boxes", "scores", "labels")
        )
        return boxes, scores, labels, counts


def _pad(values: Tensor, counts: Tensor) -> Tensor:
    """Appends zeros to an image's values until it has as many as the image with the most."""
    missing = counts.max() - torch._shape_as_tensor(values)[0]
    return torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])  # type: ignore[arg-type]  # traced


class QueryBatch(nn.Module):
    """A copy of a DETR-like detector that takes any number of images and can be traced.

    Every image has the same number of detections, so nothing is padded.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.module: QueryModel = SingleImage(detector).detector

    def forward(self, images: Tensor) -> Outputs:
        """(N, 3, H, W) in 0..1 -> the detections."""
        boxes, scores, labels = self.module.detect_batch(images)
        return boxes, scores, labels, (labels > 0).sum(dim=1)
