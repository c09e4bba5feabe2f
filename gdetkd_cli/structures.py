"""The values that pass between layers.

Shapes: N images, L levels, R regions, K classes, C channels, H x W cells or pixels.
Every box is xyxy. *Batch-image pixels* are the pixels of image i of the batch as the loader made it;
*model pixels* are those of the resized and padded tensor that a detector makes of it.
A pixel coordinate is continuous: pixel (0, 0) covers [0, 1) x [0, 1), its centre is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelSpec:
    """What is known of one pyramid level.

    Attributes:
        name: where the map comes from (a module path, an element of its output).
        channels: C.
        stride: (y, x) model pixels per cell, measured.
        offset: (y, x) model-pixel coordinate of the centre of cell (0, 0), measured.
        shape: (H, W) cells at the size the level was measured at.
        subsampled: the map only repeats cells of the level before it, or the greatest of them, and computes nothing of
            its own: the ``pool`` that torchvision's two-stage pyramids end in.
    """

    name: str
    channels: int
    stride: tuple[float, float]
    offset: tuple[float, float]
    shape: tuple[int, int]
    subsampled: bool = False


@dataclass(frozen=True)
class Frame:
    """Maps batch-image pixels to model pixels: ``model = image * scale + shift`` for each image and axis.

    Attributes:
        scale: (N, 2), x then y.
        shift: (N, 2) model pixels, x then y.
        size: (height, width) of the padded model input, in model pixels.
        known: scale and shift on the host, where it knows them without reading the device.
    """

    scale: Tensor
    shift: Tensor
    size: tuple[int, int]
    known: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(scale: Tensor, shift: Tensor, size: tuple[int, int], device: torch.device) -> Frame:
        """A frame on a device, of numbers of the host; nothing waits for the device."""
        there = [value.to(device, non_blocking=True) for value in (scale, shift)]
        return Frame(scale=there[0], shift=there[1], size=size, known=(scale, shift))

    def on_host(self) -> Frame:
        """The same frame with its tensors on the CPU."""
        scale, shift = self.known or (self.scale.cpu(), self.shift.cpu())
        return Frame(scale=scale, shift=shift, size=self.size)

    def to_model(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """(R, 4) batch-image pixels -> (R, 4) model pixels."""
        return boxes * self.scale[image_index].repeat(1, 2) + self.shift[image_index].repeat(1, 2)

    def to_image(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """(R, 4) model pixels -> (R, 4) batch-image pixels."""
        return (boxes - self.shift[image_index].repeat(1, 2)) / self.scale[image_index].repeat(1, 2)


@dataclass(frozen=True)
class Pyramid:
    """One forward's feature maps, fine to coarse, with their geometry.

    Attributes:
        maps: L tensors (N, C_l, H_l, W_l).
        levels: L specs, in the same order.
        frame: how batch-image pixels map to the model pixels that the levels' strides are in.
    """

    maps: tuple[Tensor, ...]
    levels: tuple[LevelSpec, ...]
    frame: Frame


@dataclass(frozen=True)
class Regions:
    """Boxes used by student and teacher alike; never back-propagated through.

    Attributes:
        boxes: (R, 4) batch-image pixels.
        image_index: (R,) int64, which image of the batch; non-decreasing.
        candidate: (R,) int64, the row of the student's ``Candidates`` that the region is, -1 for none.
        refined: by later stage of a cascade student, (R, 4) batch-image pixels, what it made of the boxes; else empty.
        counts: regions of each image, where the host knows them; None: read from the device at each use.
        all_candidates: whether no ``candidate`` is -1; None: read at each use.
    """

    boxes: Tensor
    image_index: Tensor
    candidate: Tensor
    refined: tuple[Tensor, ...] = ()
    counts: tuple[int, ...] | None = None
    all_candidates: bool | None = None

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def count_by_image(self, images: int) -> list[int]:
        """R_i of each of ``images`` images."""
        return count_by_image(self.image_index, images) if self.counts is None else list(self.counts)

    def per_image(self, images: int) -> list[Tensor]:
        """The boxes, split by image: ``images`` tensors (R_i, 4)."""
        return list(self.boxes.split(self.count_by_image(images)))

    def are_candidates(self) -> bool:
        """Whether every region is one of the student's candidates."""
        return bool((self.candidate >= 0).all()) if self.all_candidates is None else self.all_candidates


def count_by_image(image_index: Tensor, images: int) -> list[int]:
    """How often each of ``images`` images is in (R,) indices; waits for the device."""
    return torch.bincount(image_index, minlength=images).tolist()


@dataclass(frozen=True)
class Target:
    """One image's ground truth.

    Attributes:
        boxes: (M, 4) batch-image pixels, every side > 0.
        labels: (M,) int64 in 1..K: position in the class list, counted from 1 (0 is background).
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Attributes:
        images: N tensors (3, H_i, W_i), RGB in 0..1.
        targets: N targets.
        image_ids: (N,) int64, the data set's own ids.
    """

    images: list[Tensor]
    targets: list[Target]
    image_ids: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            images=[image.to(device, non_blocking=True) for image in self.images],
            targets=[
                Target(boxes=t.boxes.to(device, non_blocking=True), labels=t.labels.to(device, non_blocking=True))
                for t in self.targets
            ],
            image_ids=self.image_ids.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where it copies to a CUDA device without waiting."""
        return Batch(
            images=[image.pin_memory() for image in self.images],
            targets=[Target(boxes=t.boxes.pin_memory(), labels=t.labels.pin_memory()) for t in self.targets],
            image_ids=self.image_ids.pin_memory(),
        )


@dataclass(frozen=True)
class Detections:
    """One image's predictions, by falling score.

    Attributes:
        boxes: (D, 4) pixels of the image as it was given.
        scores: (D,) in 0..1.
        labels: (D,) int64 in 1..K.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LossReport:
    """What one step's forward gives.

    Attributes:
        total: the scalar that is back-propagated.
        parts: unweighted scalars by name, detached: the detector's own losses and every distillation term.
        weights: the weight of each distillation term in ``total``.
        seconds: wall time by phase, filled when the step is profiled.
    """

    total: Tensor
    parts: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
