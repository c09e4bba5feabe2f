"""The four heads of a composed detector."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from .cascade import CascadeHeads

DEFAULT_LEVELS = {"faster-rcnn": (2, 6), "cascade-rcnn": (2, 6), "retinanet": (3, 7), "fcos": (3, 7)}
# Arguments of the heads in addition to those of torchvision's classes, with their defaults.
HEAD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "faster-rcnn": {"anchor_sizes": None, "representation_size": 1024, "canonical_scale": 224},
    "cascade-rcnn": {"anchor_sizes": None, "representation_size": 1024, "canonical_scale": 224},
    "retinanet": {"anchor_sizes": None, "head_norm": False},
    "fcos": {"anchor_sizes": None, "head_convs": 4},
}


def _build_anchors(
    arguments: dict[str, Any], default: list[tuple[int, ...]], ratios: tuple[float, ...]
) -> AnchorGenerator:
    """``anchor_sizes`` of the arguments (pixels, one list per level), or the default."""
    sizes = tuple(tuple(sizes) for sizes in arguments.pop("anchor_sizes", None) or default)
    return AnchorGenerator(sizes, (ratios,) * len(sizes))


def _build_faster_rcnn(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> detection.FasterRCNN:
    hidden = int(arguments.pop("representation_size", 1024))
    pool = MultiScaleRoIAlign(
        featmap_names=[str(i) for i, stride in enumerate(strides) if stride <= 32],
        output_size=7,
        sampling_ratio=2,
        canonical_scale=int(arguments.pop("canonical_scale", 224)),
    )
    return detection.FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=_build_anchors(arguments, [(8 * stride,) for stride in strides], (0.5, 1.0, 2.0)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 7**2, hidden),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(hidden, num_classes + 1),
        **arguments,
    )


def _build_cascade_rcnn(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> detection.FasterRCNN:
    hidden = int(arguments.get("representation_size", 1024))
    module = _build_faster_rcnn(backbone, num_classes, channels, strides, arguments)
    module.roi_heads = CascadeHeads(module.roi_heads, channels, hidden, num_classes)
    return module


def _build_retinanet(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> nn.Module:
    octaves = [tuple(int(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in strides]
    anchors = _build_anchors(arguments, octaves, (0.5, 1.0, 2.0))
    norm = partial(nn.GroupNorm, _count_groups(channels)) if arguments.pop("head_norm", False) else None
    return detection.RetinaNet(
        backbone,
        num_classes=num_classes + 1,
        anchor_generator=anchors,
        head=RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes + 1, norm_layer=norm),
        **arguments,
    )


def _build_fcos(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> nn.Module:
    norm, convolutions = partial(nn.GroupNorm, _count_groups(channels)), int(arguments.pop("head_convs", 4))
    # FCOSHead requires 32 groups; its two branches do not.
    head = FCOSHead(32, 1, num_classes + 1, num_convs=1)
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes + 1, convolutions, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, convolutions, norm_layer=norm)
    return detection.FCOS(
        backbone,
        num_classes=num_classes + 1,
        anchor_generator=_build_anchors(arguments, [(stride,) for stride in strides], (1.0,)),
        head=head,
        **arguments,
    )


def _count_groups(channels: int) -> int:
    """GroupNorm's usual 32 groups, or fewer in a slim pyramid (at least 8 channels per group)."""
    groups = min(32, max(1, channels // 8))
    while channels % groups:
        groups -= 1
    return groups


HEADS = {
    "faster-rcnn": _build_faster_rcnn,
    "cascade-rcnn": _build_cascade_rcnn,
    "retinanet": _build_retinanet,
    "fcos": _build_fcos,
}
