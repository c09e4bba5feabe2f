"""torchvision's own detectors, by name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.ops.misc import FrozenBatchNorm2d

from .arguments import CLASSES, check_arguments, list_arguments, suggest

TORCHVISION_DETECTORS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)


def build_named(description: dict[str, Any], num_classes: int) -> nn.Module:
    name, arguments = description["name"], dict(description.get("arguments") or {})
    if name not in TORCHVISION_DETECTORS:
        known, near = ", ".join(TORCHVISION_DETECTORS), suggest(name, TORCHVISION_DETECTORS)
        raise ValueError(f"unknown torchvision detector {name!r}; known: {known}{near}")
    builder = getattr(detection, name)
    check_arguments(name, arguments, list_arguments(builder) | list_arguments(CLASSES[name.partition("_")[0]]))
    try:
        module: nn.Module = builder(weights=None, weights_backbone=None, num_classes=num_classes + 1, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error
    if name.startswith("maskrcnn"):  # without its mask branch it is a Faster R-CNN
        for part in ("mask_roi_pool", "mask_head", "mask_predictor"):
            setattr(module.roi_heads, part, None)
    if description.get("norm", "batch") == "frozen":
        module = _freeze_norms(module, description.get("norm_eps"))
    return module


def _freeze_norms(module: nn.Module, eps: float | None) -> nn.Module:
    """Replaces every BatchNorm2d by torchvision's FrozenBatchNorm2d, in place; ``eps`` None: keep each layer's."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps if eps is None else eps))
        else:
            _freeze_norms(child, eps)
    return module
