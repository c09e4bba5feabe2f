"""Takes training steps outside a run, for plans and timings."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.distill.distiller import Distiller, synchronize
from gdetkd_cli.engine.loop import clip_apart
from gdetkd_cli.structures import Batch, LossReport


class Stepper:
    """Takes training steps; logs and saves nothing.

    Args:
        student: the distiller's student, for plain steps.
        clip_norm: largest gradient norm; None: no clipping.
    """

    def __init__(
        self,
        *,
        distiller: Distiller,
        student: Detector,
        optimizer: Optimizer,
        accelerator: Accelerator,
        clip_norm: float | None,
    ) -> None:
        self._accelerator = accelerator
        self.device = accelerator.device
        self.distiller = distiller
        self._clip_norm = clip_norm
        self._plain = Distiller(student=student)  # for steps of a plain run of the same recipe
        forward, self._optimizer = accelerator.prepare(distiller, optimizer)
        self._forwards: dict[int, torch.nn.Module] = {
            id(distiller): forward,
            id(self._plain): accelerator.prepare(self._plain),
        }
        forward.train()

    def distil(self, batch: Batch, seconds: dict[str, float] | None = None) -> LossReport:
        """Takes one distillation step."""
        return self._step(self.distiller, batch, seconds)

    def floor(self, batch: Batch) -> None:
        """Runs the minimum of a distillation step: the teacher's features and one plain step of the student."""
        self.ask_teacher(batch)
        self.plain(batch)

    def plain(self, batch: Batch) -> None:
        """Takes one step of plain training."""
        self._step(self._plain, batch, None)

    def ask_teacher(self, batch: Batch) -> None:
        """Computes the teacher's features alone."""
        assert self.distiller.teacher is not None
        with torch.no_grad(), self._accelerator.autocast():
            self.distiller.teacher.extract_features(batch)

    def _step(self, distiller: Distiller, batch: Batch, seconds: dict[str, float] | None) -> LossReport:
        distiller.profile = seconds is not None
        report: LossReport = self._forwards[id(distiller)](batch)
        parts = {"backward": lambda: self._accelerator.backward(report.total), "optimizer": self._update}
        for name, part in parts.items():
            spent = measure_seconds(part, self.device)
            if seconds is not None:
                seconds[name] = spent
        if seconds is not None:
            seconds.update(report.seconds)
        return report

    def _update(self) -> None:
        self._accelerator.unscale_gradients()
        clip_apart(self.distiller, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of ``work``, including its work on the device."""
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start
