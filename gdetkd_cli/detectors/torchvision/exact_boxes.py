"""Half precision for networks, float32 for coordinates.

torchvision's detectors give anchors the dtype of the features, decode boxes in the dtype of the head's outputs, and
cast the ground truth to the dtype of the proposals. bfloat16 has 8 significant bits: from 512 pixels on it rounds a
coordinate to 4 pixels, from 1,024 on to 8. ``exact_boxes`` confines half precision to the network: anchors, proposals,
decoding, matching, targets, NMS and losses are computed in float32 in every family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD


@contextmanager
def exact_boxes(module: nn.Module) -> Iterator[None]:
    """Computes the coordinates of all torchvision parts of ``module`` in float32 inside the block, despite autocast.

    Without autocast it has no effect. All hooks are removed after the block.
    """
    if not any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        yield
        return
    with ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, AnchorGenerator | DefaultBoxGenerator):
                hooks.callback(part.register_forward_pre_hook(_cast_anchors).remove)
            head = _get_predicting_head(part)
            if head is not None:
                hooks.callback(head.register_forward_hook(lambda _, __, outputs: convert_to_fp32(outputs)).remove)
        yield


def _get_predicting_head(part: Any) -> nn.Module | None:
    """The submodule whose outputs are box deltas and scores; None if ``part`` has none of its own."""
    if isinstance(part, RegionProposalNetwork | RetinaNet | FCOS | SSD):
        return part.head
    return part.box_predictor if isinstance(part, RoIHeads) else None


def _cast_anchors(_: nn.Module, arguments: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Replaces the features by empty ones: generators read only their shape, dtype and device."""
    images, features = arguments
    return images, [torch.empty((), dtype=torch.float32, device=m.device).expand(m.shape) for m in features]
