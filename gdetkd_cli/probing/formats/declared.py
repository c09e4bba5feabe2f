"""Reads how a model is called from the input that its file declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.inputs import Call, stack_images, take_channels_last, take_single

_CHANNELS = (3, 1)  # colours, or grey


@dataclass(frozen=True)
class Declared:
    """An image input.

    Attributes:
        size: (height, width) in pixels if the file fixes both, else None.
        grey: it has one channel.
    """

    call: Call
    size: tuple[int, int] | None
    grey: bool


def read_declared(path: Path, shape: Sequence[object], dtype: torch.dtype) -> Declared:
    """Reads the image input of a file.

    Args:
        shape: of the input, 3 or 4 axes; an axis that is no number is free.

    Raises:
        ModelError: the images have neither 3 channels nor 1.
    """
    channels, last = _find_channels(path, shape)
    height, width = shape[-3:-1] if last else shape[-2:]
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
    first = shape[0] if isinstance(shape[0], int) else None
    if len(shape) == 3:
        call = Call(f"one ({channels}, H, W) image", "one", take_single, dtype)
    elif first is None:
        call = Call(f"(N, {channels}, H, W) tensor", "one size", stack_images, dtype)
    else:
        batch = None if first == 1 else first
        name = f"({first}, {channels}, H, W) tensor"
        call = Call(name, "one" if batch is None else "one size", stack_images, dtype, batch)
    return Declared(take_channels_last(call) if last else call, size, channels == 1)


def _find_channels(path: Path, shape: Sequence[object]) -> tuple[int, bool]:
    """Returns the number of channels, and whether they are the last axis."""
    for channels in _CHANNELS:
        if channels in (shape[-3], shape[-1]):
            return channels, shape[-3] != channels
    fixed = [side for side in (shape[-3], shape[-1]) if isinstance(side, int)]
    if isinstance(shape[-3], int) or (fixed and fixed[0] < 8):
        raise ModelError(describe_channels(path, min(fixed)))
    return _CHANNELS[0], False


def describe_channels(source: object, channels: int) -> str:
    """The error about images that cannot be made from colours."""
    return (
        f"{source} takes images of {channels} channels, which cannot be made from RGB images; use a model of 3 "
        "channels (colours) or 1 (grey)"
    )
