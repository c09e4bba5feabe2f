"""Shared by all torchvision detectors: input, pyramid and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.measure import measure_levels
from gdetkd_cli.detectors.torchvision.exact_boxes import exact_boxes
from gdetkd_cli.structures import Batch, Detections, Frame, LevelSpec, Pyramid, check_resize

LEVEL_PREFIX = "backbone."  # of a level's name, before its key in the backbone's output


def name_features(features: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's output by name; a single map is a pyramid of one level, as in torchvision's detectors."""
    return {"0": features} if isinstance(features, Tensor) else dict(features)


def measure_backbone(module: Any) -> tuple[LevelSpec, ...]:
    """Measures the pyramid of a torchvision detector; its levels are named ``backbone.KEY``."""
    backbone = module.backbone
    device = next(backbone.parameters()).device

    def forward(images: Tensor) -> dict[str, Tensor]:
        return {f"{LEVEL_PREFIX}{key}": features for key, features in name_features(backbone(images)).items()}

    with use_eval_mode(backbone):
        return measure_levels(forward, device=device)


def extract_features(module: Any, images: list[Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Runs the transform and the backbone in evaluation mode: its ImageList, and features by key.

    Images are not resized if the loader sets their size (``_skip_resize``, see ``assembly.runtime``).
    """
    check_sizes(module, images)
    with use_eval_mode(module):
        module.transform.train(module.transform._skip_resize)  # which it reads only in training mode
        resized, _ = module.transform(images)
        return resized, name_features(module.backbone(resized.tensors))


def check_sizes(module: Any, images: Sequence[Tensor]) -> None:
    """Checks that every image has at least one pixel in height and width after the detector's resize.

    Raises:
        DataError: an image is too long and narrow.
    """
    transform = module.transform
    if transform.fixed_size is not None or (transform._skip_resize and module.training):
        return
    for image in images:
        height, width = image.shape[-2:]
        check_resize(
            (height, width),
            shortest=min(transform.min_size),
            longest=transform.max_size,
            advice="cut the image, or remove it",
        )


def convert_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The batch's ground truth in torchvision's form."""
    return [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets]


def build_frame(images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> Frame:
    """The frame of a transform that resizes from the corner and pads the far sides, as GeneralizedRCNNTransform does.

    Args:
        images: N tensors (3, H_i, W_i) before the transform.
        sizes: (height, width) pixels of each image after its resize.
        padded: (height, width) pixels of the tensor of all images.
    """
    before = torch.tensor([[i.shape[-1], i.shape[-2]] for i in images], dtype=torch.float32)
    after = torch.tensor([[w, h] for h, w in sizes], dtype=torch.float32)
    return Frame.of(after / before, torch.zeros_like(before), padded, images[0].device)


def build_pyramid(
    images: Sequence[Tensor], resized: Any, features: Mapping[str, Tensor], levels: tuple[LevelSpec, ...]
) -> Pyramid:
    """The pyramid of a backbone's output by key; ``resized`` is the ImageList of the N images."""
    frame = build_frame(images, resized.image_sizes, resized.tensors.shape[-2:])
    return Pyramid(tuple(features.values()), levels, frame)


def convert_anchors(generator: Any, levels: Sequence[LevelSpec]) -> tuple[Tensor, ...]:
    """By level (A, 4) xyxy, an AnchorGenerator's anchors of a cell around its centre, in cells."""
    return tuple(
        anchors / anchors.new_tensor([level.stride[1], level.stride[0]] * 2)
        for anchors, level in zip(generator.cell_anchors, levels, strict=True)
    )


def get_device(module: nn.Module) -> torch.device:
    """The device of a module's tensors; the CPU if it has none, like a frozen TorchScript model."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def use_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts the module into evaluation mode inside the block, and back into its former mode after it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.no_grad()
def predict(module: nn.Module, images: list[Tensor]) -> list[Detections]:
    """Runs a torchvision detector; boxes in each image's own pixels, by descending score."""
    with use_eval_mode(module), exact_boxes(module):
        check_sizes(module, images)
        outputs = module(images)
    # RetinaNet and FCOS have an output for background, which an untrained one may report.
    kept = [(o, o["labels"] > 0) for o in outputs]
    return [Detections(boxes=o["boxes"][k], scores=o["scores"][k], labels=o["labels"][k]) for o, k in kept]
