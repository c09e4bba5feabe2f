"""How detectors are called with images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One way of calling a model.

    Attributes:
        name: for people.
        takes: which images go into one call: any, those of one size, or one alone.
        argument: images (3, H, W) -> what the model is given.
    """

    name: str
    takes: Literal["any", "one size", "one"]
    argument: Callable[[Sequence[Tensor]], object]

    def __call__(self, model: nn.Module, images: Sequence[Tensor]) -> object:
        return model(self.argument(images))

    def groups(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """The images in groups that one call takes, in their order."""
        alike = len({image.shape for image in images}) == 1
        if self.takes == "any" or (self.takes == "one size" and alike):
            return [list(images)]
        return [[image] for image in images]


# Tried in this order.
CALLS = (
    Call("list of (3, H, W) images in 0..1", "any", list),
    Call("(N, 3, H, W) tensor", "one size", lambda images: torch.stack(list(images))),
    Call("one (3, H, W) image in 0..1", "one", lambda images: images[0]),
)
