"""Copies from the host to the device without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def copy_numbers(values: Any, like: Tensor) -> Tensor:
    """Copies numbers to a tensor of ``like``'s dtype on its device; ``like.new_tensor`` would wait for the device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def copy_tensor(tensor: Tensor, like: Tensor) -> Tensor:
    """Copies a tensor from the host to ``like``'s device."""
    return tensor.to(like.device, non_blocking=True)
