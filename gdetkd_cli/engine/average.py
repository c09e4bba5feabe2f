"""The running average of a student's weights over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """An exponential moving average of a module's parameters and buffers, which starts at their current values.

    After step t, counted from 0: ``average = d * average + (1 - d) * value``. The decay d is the smaller one of
    ``decay`` and (1 + t) / (10 + t), so the average follows the fast changes of the first steps closely.

    Buffers of real numbers are averaged as well, because the running statistics of the last step belong to the last
    weights, not to the average. Other buffers, such as counters, and buffers that change their shape are copied.
    torch's ``AveragedModel`` keeps a copy of the whole module; a detector is read through taps in its own module.

    Args:
        module: on its device; it keeps its own values except within ``applied`` and after ``apply``.
        decay: of the average, once it is warm.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay
        self._names = frozenset(module.state_dict())  # without buffers that a file does not keep
        self._averages = self._copy_values()

    def update(self, step: int) -> None:
        """Adds the module's values after ``step``, counted from 0."""
        averages, values = [], []
        for name, value in self._list_values():
            average = self._averages[name]
            if average.is_floating_point() and average.shape == value.shape:
                averages.append(average)
                values.append(value)
            else:
                self._averages[name] = value.clone()
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, values, 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the module the averages within the block; every process calls it, and has the first one's averages."""
        own = self._copy_values()
        try:
            self.apply()
            yield
        finally:
            self._write(own)

    def apply(self) -> None:
        """Gives the module the averages for good; every process calls it, and has the first one's averages."""
        # The processes' running statistics differ until the next forward, which broadcasts those of the first one.
        broadcast(self._averages)
        self._write(self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name."""
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Takes over stored averages; None: starts at the module's current values.

        Raises:
            ValueError: they are those of another module.
        """
        current = self._copy_values()
        if state is not None and state.keys() != current.keys():
            raise ValueError("its averaged weights have other names")
        if state is not None:
            current = {name: state[name].to(value.device, copy=True) for name, value in current.items()}
        self._averages = current

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._list_values():
            value.copy_(values[name])

    def _copy_values(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._list_values()}

    def _list_values(self) -> Iterator[tuple[str, Tensor]]:
        """The module's own tensors, without gradients; a shared one comes once."""
        for name, value in chain(self._module.named_parameters(), self._module.named_buffers()):
            if name in self._names:
                yield name, value.detach()
