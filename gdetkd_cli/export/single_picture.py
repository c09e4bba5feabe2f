"""What an exported file computes: one picture in, its detections out.

Shapes: H x W pixels, D detections; boxes xyxy, pixels of the picture as it was given.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from gdetkd_cli.detectors.protocol import Detector

EXAMPLE_SIDE = 96  # square: MultiScaleRoIAlign takes the strides of its levels from the first picture it sees


class SinglePicture(nn.Module):
    """A copy of a torchvision detector that takes one picture, and that ``torch.jit`` can trace and script."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        module: Any = copy.deepcopy(detector.module).cpu().requires_grad_(False).eval()
        module([example_picture()])  # settles what torchvision decides at the first call
        module.transform = _ExactTransform(module.transform)
        module._has_warned = True  # else a scripted detector warns its user of the pair that it returns
        self.detector = module
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(3, H, W) in 0..1 -> boxes (D, 4), scores (D,), labels (D,) in 1..K."""
        if torch.jit.is_scripting():
            _, found = self.detector([image])
        else:
            found = self.detector([image])
        return found[0]["boxes"], found[0]["scores"], found[0]["labels"]


def example_picture() -> Tensor:
    """(3, H, W): what exporters run the detector on."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, EXAMPLE_SIDE, EXAMPLE_SIDE, generator=generator)


class _ExactTransform(GeneralizedRCNNTransform):
    """Resizes to the size that torchvision's transform has in eager mode.

    Traced and scripted, torchvision's own computes the size in single precision, which for a third of all picture
    sizes is a pixel off. Here it is double precision everywhere.
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

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.fixed_size is not None:
            height, width = torch.tensor(self.fixed_size[1]), torch.tensor(self.fixed_size[0])
        else:
            given = torch._shape_as_tensor(image)[-2:].to(torch.float64)
            scale = torch.min(self.min_size[-1] / given.min(), self.max_size / given.max())
            height, width = torch.floor(given * scale).to(torch.int64).unbind()
        if torch.jit.is_scripting():
            size = [int(height), int(width)]
        else:
            size = [height, width]  # tensors: tracing would make constants of ints
        resized = nn.functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False)
        return resized[0], target
