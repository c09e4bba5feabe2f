"""The base class of your own student, if its package passes batches or returns losses in a form of its own.

Example, the whole adapter of a package:

    class MyStudent(TrainableModule):
        def __init__(self, classes: int) -> None:
            super().__init__(divisor=32)
            self.net = their_package.build(num_classes=classes)

        def losses(self, images, targets):
            return self.net.compute_losses(images, [(t["labels"] - 1, t["boxes"]) for t in targets])

        def detect(self, images):
            boxes, scores = self.net(images)
            return self.select_detections(boxes, scores)

Shapes: N images, A boxes per image, K classes; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__
from torch.nn.functional import interpolate, pad
from torchvision.ops import batched_nms

_GREY = 114 / 255  # with which detectors of the YOLO family pad
_MOST_CANDIDATES = 30_000  # boxes of one image before suppression, whose time grows with their square


class TrainableModule(nn.Module):
    """A detector that states its losses and its detections; ``gdetkd`` calls it like torchvision's.

    Subclasses define ``losses`` and ``detect``. Both get one tensor: the images, resized to ``size`` if it is set, and
    padded at the far sides. Boxes are in pixels of that tensor and are converted here.
    """

    def __init__(
        self,
        *,
        divisor: int = 32,
        size: int | None = None,
        score_thresh: float = 0.01,
        nms_thresh: float = 0.65,
        detections_per_img: int = 100,
    ) -> None:
        """
        Args:
            divisor: of the height and width of the tensor, pixels: the largest stride of the network.
            size: long side to which every image is resized, pixels; None: images keep their size.
            score_thresh: detections with a lower score are dropped. This limit and the last are also those within which
                an exported file may differ, so name the network's own if ``detect`` has them.
            nms_thresh: overlap (IoU) from which on the box with the lower score is dropped.
            detections_per_img: most detections of an image.
        """
        super().__init__()
        self._divisor, self._size = divisor, size
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_img = detections_per_img

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the losses by name, in training mode; ``gdetkd`` minimises their sum.

        Args:
            images: (N, 3, H, W) in 0..1.
            targets: by image ``boxes`` (M, 4), pixels of ``images``, and ``labels`` (M,) in 1..K; M may be 0.
        """
        raise NotImplementedError(f"{type(self).__name__} must define losses(images, targets)")

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Returns by image ``boxes`` (D, 4), pixels of ``images``, ``scores`` (D,) and ``labels`` (D,) in 1..K.

        Args:
            images: (N, 3, H, W) in 0..1.
        """
        raise NotImplementedError(f"{type(self).__name__} must define detect(images)")

    def select_detections(self, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
        """Suppresses overlapping boxes, class by class.

        Args:
            boxes: (N, A, 4) pixels.
            scores: (N, A, K) in 0..1.

        Returns:
            By image ``boxes`` (D, 4), ``scores`` (D,) and ``labels`` (D,) in 1..K, by falling score.
        """
        found = []
        for own, by_class in zip(boxes.float(), scores.float(), strict=True):
            places, labels = torch.where(by_class > self.score_thresh)
            at, order = by_class[places, labels].sort(descending=True)
            at, order = at[:_MOST_CANDIDATES], order[:_MOST_CANDIDATES]
            best, labels = own[places[order]], labels[order]
            kept = batched_nms(best, at, labels, self.nms_thresh)[: self.detections_per_img]
            found.append({"boxes": best[kept], "scores": at[kept], "labels": labels[kept] + 1})
        return found

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses by name if the module trains, else detections by image; boxes in pixels of each (3, H, W) image."""
        batch, scales = self._stack(images)
        if not self.training:
            found = self.detect(batch)
            return [
                {**one, "boxes": _clip(one["boxes"] / scale, image)}
                for one, scale, image in zip(found, scales, images, strict=True)
            ]
        assert targets is not None
        return self.losses(
            batch, [{**one, "boxes": one["boxes"] * scale} for one, scale in zip(targets, scales, strict=True)]
        )

    def _stack(self, images: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns the images as one tensor, and by image the factors (4,) of its boxes."""
        resized = [image if self._size is None else _resize(image, self._size) for image in images]
        # Sizes stay traceable, so that an exported file reads images of any size.
        sides = [
            (max(image.shape[axis] for image in resized) + self._divisor - 1) // self._divisor * self._divisor
            for axis in (-2, -1)
        ]
        stacked = [
            pad(image, [0, sides[1] - image.shape[-1], 0, sides[0] - image.shape[-2]], value=_GREY) for image in resized
        ]
        scales = [(_get_sides(after) / _get_sides(before)) for before, after in zip(images, resized, strict=True)]
        return torch.stack(stacked), [scale.to(images[0])[[1, 0, 1, 0]] for scale in scales]


def _resize(image: Tensor, size: int) -> Tensor:
    """Resizes an image (3, H, W) so that its long side has ``size`` pixels."""
    given = _get_sides(image)
    sides = (given * (size / given.max())).round().clamp(min=1).long()
    # While an export traces this, numbers would become constants.
    target: Any = list(sides) if is_tracing() else sides.tolist()
    return interpolate(image[None], size=target, mode="bilinear", align_corners=False)[0]


def _get_sides(image: Tensor) -> Tensor:
    """(height, width) of an image, pixels, in double precision, on the CPU."""
    return torch._shape_as_tensor(image)[-2:].double()


def _clip(boxes: Tensor, image: Tensor) -> Tensor:
    limits = _get_sides(image).to(boxes)[[1, 0, 1, 0]]
    return torch.minimum(boxes.clamp(min=0), limits)
