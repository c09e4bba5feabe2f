"""Bodies with a feature pyramid: torchvision's ResNets, ResNeXts and MobileNets of any width and depth, and timm's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import mobilenet, resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from . import timm_bodies
from .arguments import suggest

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")


class TimmBackbone(nn.Module):
    """One of timm's bodies with a feature pyramid; named and called like torchvision's BackboneWithFPN."""

    def __init__(self, *, body: timm_bodies.TimmBody, fpn: FeaturePyramidNetwork, out_channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps: dict[str, torch.Tensor] = self.fpn(self.body(images))
        return maps


def build_backbone(description: dict[str, Any], channels: int, first: int, last: int) -> nn.Module:
    """Builds the body and an FPN with levels ``first`` to ``last``; level l has stride 2**l.

    Levels up to 5 are the body's stages. Level 6 is a max pool of level 5 (as in Faster R-CNN); with a level 7, both
    are convolutions (as in RetinaNet and FCOS).
    """
    name, norm = description["backbone"], choose_norm_layer(description.get("norm", "batch"))
    stride_levels = range(first, min(last, 5) + 1)
    extra = {5: NoExtraLevel, 6: LastLevelMaxPool, 7: partial(LastLevelP6P7, channels, channels)}[last]()
    if name.startswith(timm_bodies.PREFIX):
        if description.get("width") or description.get("blocks"):
            raise ValueError(f"'width' and 'blocks' apply to torchvision's backbones only, not to {name}; remove them")
        timm_body, widths = timm_bodies.build_body(name, stride_levels, frozen=description.get("norm") == "frozen")
        fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=extra)
        return TimmBackbone(body=timm_body, fpn=fpn, out_channels=channels)
    if name in RESNETS:
        body = _build_resnet(name, description.get("width"), description.get("blocks"), norm)
        stages = [f"layer{level - 1}" for level in stride_levels]
        widths = [_get_out_channels(getattr(body, stage)[-1]) for stage in stages]
    elif name in MOBILENETS:
        if description.get("blocks"):
            raise ValueError(f"'blocks' applies to ResNets only, not to {name}")
        multiplier = float(description.get("width") or 1.0)
        body = getattr(mobilenet, name)(weights=None, width_mult=multiplier, norm_layer=norm).features
        stages, widths = _find_stages(body, [2**level for level in stride_levels])
    else:
        known = RESNETS + MOBILENETS
        raise ValueError(
            f"unknown backbone {name!r}; known: {', '.join(known)}, and {timm_bodies.PREFIX}NAME{suggest(name, known)}"
        )
    returned = {stage: str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(body, returned, widths, channels, extra_blocks=extra)


def choose_norm_layer(norm: str) -> Callable[..., nn.Module]:
    return {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}[norm]


def _build_resnet(
    name: str, width: int | None, blocks: list[int] | None, norm: Callable[..., nn.Module]
) -> resnet.ResNet:
    """Builds torchvision's ResNet, with ``width`` channels after the stem (64 in the original) and any depth."""
    body: resnet.ResNet = getattr(resnet, name)(weights=None, norm_layer=norm)
    if width is None and blocks is None:
        return body
    first = body.layer1[0]
    block = type(first)
    depth = blocks or [len(getattr(body, f"layer{i}")) for i in range(1, 5)]
    stem = 64 if width is None else int(width)
    if stem < 1:
        raise ValueError(f"{name}: width must be at least 1 channel, got {width}")
    body.inplanes = stem
    body.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
    body.bn1 = norm(stem)
    for i, count in enumerate(depth):
        # ResNet's own stage builder, which reads and advances body.inplanes.
        stage = body._make_layer(block, stem * 2**i, count, stride=1 if i == 0 else 2)
        setattr(body, f"layer{i + 1}", stage)
    for module in body.modules():  # like ResNet.__init__
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _get_out_channels(block: Any) -> int:
    """Channels after a ResNet block: BasicBlock ends in conv2, Bottleneck in conv3."""
    last = block.conv3 if hasattr(block, "conv3") else block.conv2
    return int(last.out_channels)


def _find_stages(body: nn.Sequential, strides: list[int]) -> tuple[list[str], list[int]]:
    """Runs the body to find the last module at each stride, and its channels."""
    size = 64
    sizes: list[int] = []
    widths: list[int] = []
    x = torch.zeros(1, 3, size, size)
    was_training = body.training
    body.eval()
    with torch.no_grad():
        for module in body:
            x = module(x)
            sizes.append(x.shape[-1])
            widths.append(x.shape[1])
    body.train(was_training)
    last_at = {s: i for i, s in enumerate(sizes)}
    chosen = [last_at[size // stride] for stride in strides]
    return [str(i) for i in chosen], [widths[i] for i in chosen]


class NoExtraLevel(ExtraFPNBlock):
    """Adds no level, whereas BackboneWithFPN adds a max-pooled one by default."""

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        return results, names
