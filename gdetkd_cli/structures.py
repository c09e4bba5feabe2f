"""The values that pass between layers.

Shapes: N images, L levels, R regions, M boxes, K classes, C channels, H x W cells or pixels.
Every box is xyxy. *Batch-image pixels* are the pixels of an image as the loader returns it; *model pixels* are those of
the resized and padded tensor inside a detector. Pixel coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1),
its centre is (0.5, 0.5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdetkd_cli.errors import DataError


@dataclass(frozen=True)
class LevelSpec:
    """One pyramid level.

    Attributes:
        name: source of the map (a module path, an element of its output).
        channels: C.
        stride: (y, x) model pixels per cell, measured.
        offset: (y, x) model-pixel coordinate of the centre of cell (0, 0), measured.
        shape: (H, W) cells at the image size of the measurement.
        subsampled: whether the map is only a subsampling or max pooling of the previous level, like the ``pool`` level
            of torchvision's two-stage pyramids.
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
        known: scale and shift on the host, if they are known without reading the device.
    """

    scale: Tensor
    shift: Tensor
    size: tuple[int, int]
    known: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(scale: Tensor, shift: Tensor, size: tuple[int, int], device: torch.device) -> Frame:
        """Builds a frame on a device from tensors on the host, without waiting for the device."""
        there = [value.to(device, non_blocking=True) for value in (scale, shift)]
        return Frame(scale=there[0], shift=there[1], size=size, known=(scale, shift))

    def on_host(self) -> Frame:
        """Returns the frame with its tensors on the CPU."""
        scale, shift = self.known or (self.scale.cpu(), self.shift.cpu())
        return Frame(scale=scale, shift=shift, size=self.size)

    def to_model(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Converts (R, 4) from batch-image pixels to model pixels."""
        return boxes * self.scale[image_index].repeat(1, 2) + self.shift[image_index].repeat(1, 2)

    def to_image(self, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Converts (R, 4) from model pixels to batch-image pixels."""
        return (boxes - self.shift[image_index].repeat(1, 2)) / self.scale[image_index].repeat(1, 2)


@dataclass(frozen=True)
class Pyramid:
    """The feature maps of one forward, fine to coarse, with their geometry.

    Attributes:
        maps: L tensors (N, C_l, H_l, W_l).
        levels: L specs, in the same order.
        frame: maps batch-image pixels to model pixels, the unit of the levels' strides.
    """

    maps: tuple[Tensor, ...]
    levels: tuple[LevelSpec, ...]
    frame: Frame


@dataclass(frozen=True)
class Regions:
    """Boxes shared by student and teacher; no gradient flows through them.

    Attributes:
        boxes: (R, 4) batch-image pixels.
        image_index: (R,) int64, index of the image in the batch; non-decreasing.
        candidate: (R,) int64, the region's row in the student's ``Candidates``, or -1.
        refined: the boxes after each later stage of a cascade student, (R, 4) batch-image pixels; else empty.
        counts: number of regions in each image, on the host; None to read it from the device at each use.
        all_candidates: whether no ``candidate`` is -1; None to read it from the device at each use.
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
        """Returns the number of regions in each of ``images`` images."""
        return count_by_image(self.image_index, images) if self.counts is None else list(self.counts)

    def per_image(self, images: int) -> list[Tensor]:
        """Splits the boxes by image into ``images`` tensors (R_i, 4)."""
        return list(self.boxes.split(self.count_by_image(images)))

    def are_candidates(self) -> bool:
        """Whether every region is one of the student's candidates."""
        return bool((self.candidate >= 0).all()) if self.all_candidates is None else self.all_candidates


def count_by_image(image_index: Tensor, images: int) -> list[int]:
    """Counts the (R,) indices of each of ``images`` images; waits for the device."""
    return torch.bincount(image_index, minlength=images).tolist()


@dataclass(frozen=True)
class Target:
    """One image's ground truth.

    Attributes:
        boxes: (M, 4) batch-image pixels, every side > 0.
        labels: (M,) int64 in 1..K, positions in the class list counted from 1 (0 is background).
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageView:
    """An image as the data set has it, or mirrored, without any other random change: what a stored teacher saw.

    Attributes:
        name: digest of its pixels, which identifies it in every data set and on every machine.
        pixels: (3, H, W) uint8 on the host; None: the batch's image shows the same.
    """

    name: str
    pixels: Tensor | None = None


def name_view(pixels: Tensor) -> str:
    """Digests an image (3, H, W) uint8 on the host."""
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=16)
    digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """The input of one step.

    Attributes:
        images: N tensors (3, H_i, W_i), RGB in 0..1.
        targets: N targets.
        image_ids: (N,) int64, ids in the data set.
        views: N views, if the loader was asked for them; else empty.
    """

    images: list[Tensor]
    targets: list[Target]
    image_ids: Tensor
    views: tuple[ImageView, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """Copies the batch to a device."""
        return self._copy(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copies the batch to page-locked memory, from which copies to a CUDA device do not wait."""
        return self._copy(Tensor.pin_memory)

    def _copy(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        targets = [Target(boxes=copy(target.boxes), labels=copy(target.labels)) for target in self.targets]
        return Batch([copy(image) for image in self.images], targets, copy(self.image_ids), self.views)


def group_by_size(sizes: Iterable[tuple[int, ...]], most: int) -> Iterator[list[int]]:
    """Yields the places of images of one size, at most ``most`` together; 0: all of a size."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, size in enumerate(sizes):
        by_size.setdefault(size, []).append(place)
    for places in by_size.values():
        step = most or len(places)
        yield from (places[start : start + step] for start in range(0, len(places), step))


@dataclass(frozen=True)
class Detections:
    """One image's predictions, by falling score.

    Attributes:
        boxes: (M, 4) pixels of the input image.
        scores: (M,) in 0..1.
        labels: (M,) int64 in 1..K.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LossReport:
    """The losses of one step.

    Attributes:
        total: the scalar to back-propagate.
        parts: unweighted, detached scalars by name: the detector's own losses and every distillation term.
        weights: the weight of each distillation term in ``total``.
        seconds: wall time by phase if the step is profiled, else empty.
    """

    total: Tensor
    parts: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def check_resize(size: tuple[int, int], *, shortest: int, longest: int, advice: str) -> None:
    """Checks that an image keeps a pixel in height and width when it is resized.

    Args:
        size: (height, width) pixels.
        shortest: the short side after the resize, unless the long side exceeds ``longest``.
        longest: maximum long side in pixels.
        advice: the end of the message.

    Raises:
        DataError: the image is too long and narrow.
    """
    short, long = sorted(size)
    scale = min(shortest / short, longest / long)
    if short * scale < 1 or long * scale < 2:  # torch cannot resize to a single pixel
        raise DataError(
            f"an image of {size[1]} x {size[0]} pixels is too long and narrow: with a long side of {longest} pixels, "
            f"its short side has less than one; {advice}"
        )
