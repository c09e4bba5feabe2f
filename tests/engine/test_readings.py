"""Numbers of several steps, read together: their order and their faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from two_processes import run_in_two_processes

from gdetkd_cli.engine.readings import Reading, Readings, Window, average_reports, choose_interval
from gdetkd_cli.structures import LossReport


def add(
    readings: Readings, step: int, loss: float = 1.0, *, norm: float = 2.0, scale: float = 1.0, **parts: float
) -> None:
    values: dict[str, Tensor] = {name: torch.tensor(value) for name, value in parts.items()}
    norms = (torch.tensor(norm), torch.tensor(0.5))
    readings.add(step=step, images=2, loss=torch.tensor(loss), norms=norms, scale=torch.tensor(scale), parts=values)


def test_steps_are_read_in_their_order_with_their_own_parts() -> None:
    readings = Readings(every=3)
    add(readings, 7, 1.5, sgfi=0.1)
    add(readings, 8, 2.5, sgfi=0.2, ckd=0.3)
    assert not readings.due
    add(readings, 9)
    assert readings.due

    found = readings.read()
    assert [one.step for one in found] == [7, 8, 9]
    assert [one.loss for one in found] == [1.5, 2.5, 1.0]
    assert found[1] == Reading(8, 2, 2.5, 2.0, 0.5, 1.0, {"sgfi": pytest.approx(0.2), "ckd": pytest.approx(0.3)})
    assert found[2].parts == {}
    assert readings.read() == []
    assert not readings.due


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_scalar_is_read_whatever_its_kind(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    readings = Readings(every=1)
    loss = torch.full(shape, 0.75, dtype=dtype, requires_grad=True)
    readings.add(
        step=0, images=1, loss=loss, norms=(torch.ones(()), torch.ones(())), scale=torch.ones(()), parts={"own": loss}
    )
    (found,) = readings.read()

    assert (found.loss, found.parts) == (0.75, {"own": 0.75})


def test_faults() -> None:
    readings = Readings(every=100)
    nan, inf = float("nan"), float("inf")
    add(readings, 0)
    add(readings, 1, inf, norm=nan)  # a loss comes before its gradient
    add(readings, 2, norm=inf)
    add(readings, 3, norm=inf, scale=2.0)  # the scaler passes over this step
    add(readings, 4, inf, scale=2.0)  # but a loss that overflows is a fault at any scale
    faults = [one.fault() for one in readings.read()]

    assert faults == [None, ("loss", inf), ("gradient's norm", inf), None, ("loss", inf)]


def test_a_cpu_is_read_at_every_step() -> None:
    assert choose_interval(torch.device("cpu"), 50) == 1
    assert choose_interval(torch.device("cuda"), 50) == 50


def make_report(total: float, **parts: float) -> LossReport:
    values = {name: torch.tensor(value) for name, value in parts.items()}
    return LossReport(total=torch.tensor(total), parts=values, weights={})


def test_a_loss_that_a_batch_lacks_counts_as_nothing() -> None:
    for reports in (
        [make_report(3, a=1, box=2), make_report(1, a=1)],
        [make_report(1, a=1), make_report(3, a=1, box=2)],
    ):
        mean = average_reports(reports)
        assert mean.total == 2 and mean.parts == {"a": 1, "box": 1}


def test_processes_may_have_different_losses(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, float]:
        parts = {"a": 1.0, "box": 4.0} if rank else {"own": 6.0, "a": 3.0}
        window = Window(steps=1, images=2, loss=5.0, parts=parts).average_over(2, None)
        return {"images": window.images, "loss": window.loss, **window.parts}

    for found in run_in_two_processes(work, tmp_path):
        assert found == {"images": 4, "loss": 5.0, "a": 2.0, "own": 3.0, "box": 2.0}
