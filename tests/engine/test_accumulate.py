"""One optimizer step over several batches, on a loss that is a mean over images: numbers made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gdetkd_cli.engine.events import silent
from gdetkd_cli.engine.loop import Loop, LoopOptions
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.engine.schedule import build_schedule
from gdetkd_cli.engine.signals import StopSignals
from gdetkd_cli.errors import NonFiniteLossError
from gdetkd_cli.structures import Batch, LossReport, Target

LR = 0.01


class Squares(nn.Module):
    """The loss (w * v)^2, a mean over images whose pixels are all v; w starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.student.weight)
        self.step = 0

    def added_parameters(self) -> list[nn.Parameter]:
        return []

    def forward(self, batch: Batch) -> LossReport:
        values = torch.stack([image.mean() for image in batch.images])
        loss = self.student(values[:, None]).square().mean()
        return LossReport(total=loss, parts={"square": loss.detach()}, weights={})


def make_batch(values: Sequence[float]) -> Batch:
    target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    images = [torch.full((3, 2, 2), float(value)) for value in values]
    return Batch(images=images, targets=[target] * len(values), image_ids=torch.arange(len(values)))


def train(folder: Path, batches: Sequence[Sequence[float]], *, accumulate: int, clip: float | None = None) -> Any:
    """Trains on the batches; returns w and the log."""
    distiller: Any = Squares()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=LR)
    steps = len(batches) // accumulate

    def read(start: int) -> Iterator[Batch]:
        return map(make_batch, batches[start * accumulate :])

    folder.mkdir(parents=True)
    Loop(
        accelerator=Accelerator(cpu=True),
        distiller=distiller,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, name="constant", steps=steps, warmup_steps=0, milestones=[], gamma=1.0),
        batches=read,
        evaluate=lambda: None,
        write_student=lambda path: path.touch(),
        folder=RunFolder(folder),
        options=LoopOptions(steps, clip, 1, None, 100, accumulate=accumulate),
        origin={},
        average=None,
        signals=StopSignals(),
        observer=silent,
    ).run()
    weight: Tensor = distiller.student.weight
    return float(weight.detach()), list(RunFolder(folder).read_log())


def test_two_batches_of_two_are_one_of_four(tmp_path: Path) -> None:
    # mean(v^2) = 7.5 over 1, 2, 3, 4, so the gradient at w = 1 is 15.
    whole, whole_log = train(tmp_path / "whole", [(1, 2, 3, 4)], accumulate=1)
    parts, parts_log = train(tmp_path / "parts", [(1, 2), (3, 4)], accumulate=2)
    assert whole == pytest.approx(1 - LR * 15)
    assert parts == pytest.approx(whole, rel=1e-6)
    for (line,) in (whole_log, parts_log):
        assert (line["step"], line["loss"], line["square"]) == (1, pytest.approx(7.5), pytest.approx(7.5))
        assert line["gradient_norm"] == pytest.approx(15)


def test_the_mean_gradient_is_clipped_and_not_each_batch(tmp_path: Path) -> None:
    parts, (line,) = train(tmp_path / "run", [(1, 2), (3, 4)], accumulate=2, clip=6.0)
    assert line["gradient_norm"] == pytest.approx(15)
    assert parts == pytest.approx(1 - LR * 6, rel=1e-5)


def test_every_batch_counts_the_same_whatever_its_images(tmp_path: Path) -> None:
    weight, _ = train(tmp_path / "run", [(1, 1, 1), (3,)], accumulate=2)
    assert weight == pytest.approx(1 - LR * 2 * (1 + 9) / 2)  # not (1 + 1 + 1 + 9) / 4


def test_steps_and_rates_count_optimizer_steps_and_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdetkd_cli.engine.readings.Window.measure_seconds", lambda self: 2.0)
    _, log = train(tmp_path / "run", [(1, 2), (3, 4), (1,), (2,), (3,), (4,)], accumulate=2)
    assert [line["step"] for line in log] == [1, 2, 3]
    assert [line["images_per_second"] for line in log] == [2.0, 1.0, 1.0]


def test_a_fault_of_the_first_batch_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 0"):
        train(tmp_path / "run", [(float("nan"), 2), (3, 4)], accumulate=2)
    assert not list((tmp_path / "run").iterdir())
    assert not list(RunFolder(tmp_path / "run").read_log())
