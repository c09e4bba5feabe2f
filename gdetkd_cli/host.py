"""What passes between the host and the device without a wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def beside(values: Any, like: Tensor) -> Tensor:
    """Numbers of the host as a tensor of ``like``'s dtype on its device. ``like.new_tensor`` would wait for it."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def sent(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor of the host on ``like``'s device."""
    return tensor.to(like.device, non_blocking=True)
