"""Keeps losses and gradient norms on the device and reads those of many steps at once.

Reading one number makes the host wait until the device has finished all its work, and then the device waits for the
host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gdetkd_cli.structures import LossReport

_MOST = 1000  # unread steps, even if the run is logged less often


@dataclass(frozen=True)
class Reading:
    """One step's numbers.

    Attributes:
        step: counted from 0.
        images: of this process.
        student_norm, added_norm: gradient norms before clipping.
        scale: of half precision's gradients; 1 if they are not scaled.
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
        """The name and value of a number that is not finite.

        A gradient that overflows in half precision is no fault while its scale is above 1: the scaler skips the step
        and halves the scale. At 1 the gradient itself overflows.
        """
        if not math.isfinite(self.loss):
            return "loss", self.loss
        norm = self.student_norm + self.added_norm
        return None if math.isfinite(norm) or self.scale > 1 else ("gradient's norm", norm)


class Readings:
    """Unread numbers of steps.

    Args:
        every: steps after which they are due.
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
        """Adds one step's scalars without waiting for them."""
        values = [loss, *norms, scale, *parts.values()]
        self._steps.append((step, images, tuple(parts)))
        scalars = [value.detach().to(loss.device, torch.float32, non_blocking=True).reshape(()) for value in values]
        self._values.append(torch.stack(scalars))

    @property
    def due(self) -> bool:
        return len(self._steps) >= self._every

    def read(self) -> list[Reading]:
        """Reads the steps since the last call, in order; waits for the device once."""
        numbers = iter(torch.cat(self._values).tolist() if self._values else [])
        readings = []
        for step, images, names in self._steps:
            loss, student_norm, added_norm, scale = (next(numbers) for _ in range(4))
            parts = {name: next(numbers) for name in names}
            readings.append(Reading(step, images, loss, student_norm, added_norm, scale, parts))
        self._steps, self._values = [], []
        return readings


def choose_interval(device: torch.device, log_every: int) -> int:
    """Steps between two readings: 1 on a CPU, where reading is free and a fault shows at once."""
    return 1 if device.type == "cpu" else log_every


@dataclass
class Window:
    """Sums over the steps since the last log line.

    Attributes:
        seconds: time spent before ``started``: before the run was resumed.
    """

    started: float = field(default_factory=perf_counter)
    seconds: float = 0.0
    steps: int = 0
    images: int = 0
    loss: float = 0.0
    norm: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        self.steps += 1
        self.images += reading.images
        self.loss += reading.loss
        self.norm = reading.student_norm
        for name, value in reading.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    def average_over(self, processes: int, group: Any) -> Window:
        """The images of all processes, and the mean of their sums; every process of the group calls it.

        A process may lack a loss, for example a user's student one of boxes where no image had objects.
        """
        if processes == 1:
            return self
        named: list[list[str]] = [[] for _ in range(processes)]
        torch.distributed.all_gather_object(named, list(self.parts), group=group)
        names = list(dict.fromkeys(chain.from_iterable(named)))
        parts = [self.parts.get(name, 0.0) for name in names]
        sums = torch.tensor([self.images, self.loss, *parts], dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=group)
        loss, *parts = (sums[1:] / processes).tolist()
        return replace(self, images=int(sums[0]), loss=loss, parts=dict(zip(names, parts, strict=True)))

    def measure_seconds(self) -> float:
        return self.seconds + perf_counter() - self.started

    def to_state(self) -> dict[str, Any]:
        """The sums, to continue from with ``Window(**state)``."""
        state = asdict(self) | {"seconds": self.measure_seconds()}
        return {name: value for name, value in state.items() if name != "started"}


def average_reports(reports: Sequence[LossReport]) -> LossReport:
    """The mean losses of the batches of one step, on their device; a loss that a batch lacks counts as 0 there."""
    names = dict.fromkeys(name for report in reports for name in report.parts)
    zero = torch.zeros_like(reports[0].total)

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.float() for value in values]).mean(dim=0)

    return replace(
        reports[0],
        total=mean([report.total for report in reports]),
        parts={name: mean([report.parts.get(name, zero) for report in reports]) for name in names},
    )
