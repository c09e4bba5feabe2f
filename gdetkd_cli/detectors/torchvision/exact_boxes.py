"""Half precision for networks, float32 for coordinates.

torchvision's detectors give anchors the dtype of the features, decode boxes in the dtype of the head's outputs, and
cast the ground truth to the dtype of the proposals. bfloat16 has 8 significant bits: from 512 pixels on it rounds a
coordinate to 4 pixels, from 1,024 on to 8. ``exact_boxes`` keeps half precision on the network's side of these
borders, so that anchors, proposals, decoding, matching, targets, NMS and losses are computed in float32, in every
family.
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
    """Inside, every torchvision part of ``module`` computes coordinates in float32, whatever autocast is active.

    Without autocast nothing changes. No hook remains after the ``with``.
    """
    if not _autocast_is_active():
        yield
        return
    with ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, AnchorGenerator | DefaultBoxGenerator):
                hooks.callback(part.register_forward_pre_hook(_anchors_in_float32).remove)
            head = _predicting_head(part)
            if head is not None:
                hooks.callback(head.register_forward_hook(_outputs_in_float32).remove)
        yield


def _autocast_is_active() -> bool:
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _predicting_head(part: Any) -> nn.Module | None:
    """The submodule whose outputs are box deltas and scores; None where ``part`` has none of its own."""
    if isinstance(part, RegionProposalNetwork | RetinaNet | FCOS | SSD):
        return part.head
    return part.box_predictor if isinstance(part, RoIHeads) else None


def _anchors_in_float32(_: nn.Module, arguments: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Generators read the shape, dtype and device of the features, never their values."""
    images, features = arguments
    return images, [torch.empty((), dtype=torch.float32, device=m.device).expand(m.shape) for m in features]


def _outputs_in_float32(_: nn.Module, __: Any, outputs: Any) -> Any:
    return convert_to_fp32(outputs)
