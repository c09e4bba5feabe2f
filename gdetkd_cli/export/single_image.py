"""The module of an exported file: one image in, its detections out.

Shapes: H x W pixels, D detections; boxes xyxy, pixels of the input image.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]  # documented, but not in its __all__
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.transformers.model import QueryModel, fix_positions

_EXAMPLE_SIDE = 96


class SingleImage(nn.Module):
    """A copy of a torchvision detector, on the CPU, that takes one image and can be traced and scripted."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        module: Any = copy.deepcopy(detector.module).cpu().requires_grad_(False).eval()
        module([build_example_image()])  # torchvision sets the scales of its RoI pooling at the first call
        if isinstance(getattr(module, "transform", None), GeneralizedRCNNTransform):
            module.transform = _ExactTransform(module.transform)
        if isinstance(module, QueryModel):
            fix_positions(module)
        module._has_warned = True  # else a scripted detector warns that it returns a pair
        self.detector = module
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(3, H, W) in 0..1 -> boxes (D, 4), scores (D,), labels (D,)."""
        if is_scripting():
            _, found = self.detector([image])
        else:
            found = self.detector([image])
        boxes, scores, labels = found[0]["boxes"], found[0]["scores"], found[0]["labels"]
        objects = labels > 0  # like Detector.predict: 0 is background
        return boxes[objects], scores[objects], labels[objects]


def build_example_image() -> Tensor:
    """(3, H, W): the image on which an exporter runs the detector.

    It is square, because torchvision computes a level's stride from the height of the image and the cells of the padded
    one, which is wrong for a low, wide image.
    """
    return torch.rand(3, _EXAMPLE_SIDE, _EXAMPLE_SIDE, generator=torch.Generator().manual_seed(0))


class _ExactTransform(GeneralizedRCNNTransform):
    """Resizes an image to the same size as torchvision in eager mode.

    torchvision computes the size in double precision in eager mode, but in single precision when traced or scripted, so
    for one image size in seven, or in two, it is a pixel off. This transform always uses double precision.
    """

    def __init__(self, original: GeneralizedRCNNTransform) -> None:
        super().__init__(
            min_size=original.min_size[-1],
            max_size=original.max_size,
            image_mean=original.image_mean,
            image_std=original.image_std,
            size_divisible=original.size_divisible,
            fixed_size=original.fixed_size,
        )

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.fixed_size is not None:  # (width, height)
            size = torch.tensor([self.fixed_size[1], self.fixed_size[0]])
        else:
            given = torch._shape_as_tensor(image)[-2:].to(torch.float64)
            limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
            # torch.div, because a number divided by a tensor is rounded twice.
            scale = torch.div(limits, torch.stack([given.min(), given.max()])).min()
            size = torch.floor(given * scale).to(torch.int64)
        sides = [int(size[0]), int(size[1])] if is_scripting() else _to_traceable(size)
        resized = nn.functional.interpolate(image[None], size=sides, mode="bilinear", align_corners=False)
        return resized[0], target


@torch.jit.unused
def _to_traceable(size: Tensor) -> list[int]:
    """The two numbers as tensors despite the type, since the tracer makes constants of ints."""
    return cast(list[int], list(size))
