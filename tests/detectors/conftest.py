"""Fixtures of the detectors' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet, vgg

from gdetkd_cli.structures import Batch, Target


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Shallow ResNets and a slim VGG with the real ones' stages, strides and channels.

    The full ResNets from which composed ones are cut get no weights, because initialising them dominates the run time.
    """

    def shallow_resnet50(*, norm_layer: Callable[..., nn.Module] | None = None, **_: Any) -> nn.Module:
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=norm_layer, width_per_group=8)

    def without_weights(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def build(**arguments: Any) -> nn.Module:
            with torch.device("meta"):
                return builder(**arguments)

        return build

    class SlimVGG16(nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            widths = [8, 8, "M", 16, 16, "M", 16, 16, 16, "M", 32, 32, 512, "M", 32, 32, 512, "M"]
            self.features = vgg.make_layers(widths)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("faster_rcnn", "mask_rcnn", "retinanet", "fcos"):
            patch.setattr(f"torchvision.models.detection.{module}.resnet50", shallow_resnet50)
        patch.setattr("torchvision.models.detection.ssd.vgg16", SlimVGG16)
        for name in ("resnet18", "resnext50_32x4d"):
            patch.setattr(resnet, name, without_weights(getattr(resnet, name)))
        yield


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two images that every detector enlarges, the second without objects."""
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=[torch.rand(3, 48, 64, generator=generator), torch.rand(3, 60, 40, generator=generator)],
        targets=[
            Target(boxes=torch.tensor([[4.0, 6, 30, 38], [28, 10, 60, 44]]), labels=torch.tensor([1, 2])),
            Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
        ],
        image_ids=torch.tensor([101, 102]),
    )
