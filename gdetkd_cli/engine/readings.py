"""Losses and gradient norms stay on the device until someone needs their numbers.

Reading one number makes the host wait until the device has done all that it was given, and the device then waits for
the host. So a step's numbers are kept there, and read for many steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 1000  # steps kept unread, however seldom the run is logged


@dataclass(frozen=True)
class Reading:
    """One step's numbers.

    Attributes:
        step: counted from 0.
        images: of this process.
        loss: the total.
        student_norm, added_norm: gradient norms before clipping.
        scale: of half precision's gradients; 1 where they are not scaled.
        parts: unweighted losses by name.
    """

    step: int
    images: int
    loss: float
    student_norm: float
    added_norm: float
    scale: float
    parts: dict[str, float]

    def fault(self) -> tuple[str, float] | None:
        """What is not finite, and its value.

        A gradient that overflows in half precision is no fault while its scale can still be halved: the scaler passes
        over the step. At 1, what overflows is the gradient itself.
        """
        if not math.isfinite(self.loss):
            return "loss", self.loss
        norm = self.student_norm + self.added_norm
        return None if math.isfinite(norm) or self.scale > 1 else ("gradient's norm", norm)


class Readings:
    """Steps whose numbers nobody has read yet.

    Args:
        every: steps after which they should be read. 1 on a CPU, where reading is free: a fault then shows at once.
    """

    def __init__(self, every: int) -> None:
        self._every = min(every, _MOST)
        self._steps: list[tuple[int, int, tuple[str, ...]]] = []
        self._values: list[Tensor] = []

    def add(
        self,
        *,
        step: int,
        images: int,
        loss: Tensor,
        norms: tuple[Tensor, Tensor],
        scale: Tensor,
        parts: Mapping[str, Tensor],
    ) -> None:
        """Keeps one step's scalars, without waiting for them."""
        values = [loss, *norms, scale, *parts.values()]
        self._steps.append((step, images, tuple(parts)))
        own = (value.detach().to(loss.device, torch.float32, non_blocking=True).reshape(()) for value in values)
        self._values.append(torch.stack(list(own)))

    @property
    def due(self) -> bool:
        return len(self._steps) >= self._every

    def read(self) -> list[Reading]:
        """The steps since the last call, in their order: one wait for the device."""
        numbers = iter(torch.cat(self._values).tolist() if self._values else [])
        found = []
        for step, images, names in self._steps:
            loss, student_norm, added_norm, scale = (next(numbers) for _ in range(4))
            parts = {name: next(numbers) for name in names}
            found.append(Reading(step, images, loss, student_norm, added_norm, scale, parts))
        self._steps, self._values = [], []
        return found


def reads_every(device: torch.device, log_every: int) -> int:
    """Steps between two readings."""
    return 1 if device.type == "cpu" else log_every
