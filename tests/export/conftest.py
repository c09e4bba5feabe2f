"""Detectors with detections, and images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector

CLASSES = ("circle", "square", "triangle")
SIZES = ((96, 96), (50, 70), (120, 64), (30, 173), (201, 37))
SSDLITE = {
    "kind": "torchvision",
    "name": "ssdlite320_mobilenet_v3_large",
    "arguments": {"score_thresh": 0.7},  # the fewer boxes, the fewer whose order rounding could decide
}


@pytest.fixture(scope="session")
def images() -> list[Tensor]:
    """Noise of different sizes; for some, torchvision's traced or scripted resize is a pixel off."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, height, width, generator=generator) for height, width in SIZES]


@pytest.fixture(scope="session")
def lively(
    tiny_description: Callable[..., dict[str, Any]], images: list[Tensor]
) -> Callable[..., tuple[Detector, dict[str, Any]]]:
    """(family, timm body, arguments) -> a detector with detections in the images, and its description."""

    def make(family: str, body: str | None = None, **arguments: Any) -> tuple[Detector, dict[str, Any]]:
        fields = {"backbone": f"timm/{body}", "width": None, "blocks": None} if body else {}
        described = SSDLITE if family == "ssdlite" else tiny_description(family, arguments=arguments, **fields)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            detector = catalog.build(described, CLASSES)
            _enliven(detector.module, images)
        return detector, described

    return make


@torch.no_grad()
def _enliven(module: Any, images: list[Tensor]) -> None:
    """Draws weights that give different scores at each place; fresh ones do not, so rounding decides the order."""
    for name, layer in module.named_modules():
        if name.startswith(("head.", "roi_heads.", "rpn.")) and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if "bbox" in name or "regression" in name:
                layer.weight.mul_(0.5)
            if layer.bias is not None:
                layer.bias.zero_()
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over the batches that follow
    module.train()
    module.backbone(module.transform(images)[0].tensors)
    module.eval()
