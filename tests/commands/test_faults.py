"""Losses that are read late, as on a GPU: a fault stops the run before anything is written that has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from gdetkd_cli.commands import run_distill
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine import loop
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import NonFiniteLossError
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.structures import Batch, LossReport


@pytest.fixture(autouse=True)
def _read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "choose_interval", lambda device, log_every: log_every)


def poison(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[LossReport], LossReport]) -> None:
    """Changes the report of every step from ``at`` on."""
    forward = Distiller.forward

    def poisoned(self: Distiller, batch: Batch) -> LossReport:
        report = forward(self, batch)
        return report if self.step < at else change(report)

    monkeypatch.setattr(Distiller, "forward", poisoned)


def with_nan(report: LossReport) -> LossReport:
    return replace(report, total=report.total * float("nan"))


def recipe(*, steps: int = 12, log_every: int = 100, checkpoint_every: int = 100, **train: int) -> Recipe:
    return toy.recipe(steps=steps, log_every=log_every, checkpoint_every=checkpoint_every, **train)


def written(run: Path) -> list[int]:
    """The steps that the log has, evaluations included."""
    return [line["step"] for line in RunFolder(run).read_log()]


def test_what_is_logged_is_what_an_immediate_reader_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for late in (True, False):
        if not late:
            monkeypatch.setattr(loop, "choose_interval", lambda device, log_every: 1)
        run = run_distill(recipe(steps=7, log_every=3, checkpoint_every=2), output=tmp_path / str(late)).run
        lines.append([{k: v for k, v in x.items() if k != "images_per_second"} for x in RunFolder(run).read_log()])

    assert [line["step"] for line in lines[0]] == [3, 6, 7, 7]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("occasion", [{"log_every": 4}, {"checkpoint_every": 4}, {"evaluate_every": 4}, {"steps": 4}])
def test_a_fault_is_found_before_anything_is_written(
    occasion: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, with_nan)  # step 1, and all after it
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 1 \(loss_classifier \d.*sgfi \d"):
        run_distill(recipe(**occasion), output=tmp_path / "run")

    assert written(tmp_path / "run") == []
    assert not (tmp_path / "run" / "resume").exists()
    assert not (tmp_path / "run" / "student.pt").exists()


def test_the_last_checkpoint_before_a_fault_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 4, with_nan)
    with pytest.raises(NonFiniteLossError, match=r"nan at step 4 \(.*Try a lower train\.optimizer\.lr"):
        run_distill(recipe(checkpoint_every=3, log_every=2), output=tmp_path / "run")

    checkpoint = RunFolder(tmp_path / "run").checkpoints().open_latest()
    assert checkpoint is not None
    assert checkpoint.progress.step == 3
    assert written(tmp_path / "run") == [2, 4]
    assert all(value.isfinite().all() for value in checkpoint.read_state()["distiller"].values())


def test_an_error_that_follows_a_fault_is_told_as_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Distiller.forward

    def failing(self: Distiller, batch: Batch) -> LossReport:
        if self.step == 6:  # as an operator that meets NaN coordinates
            raise RuntimeError("index out of bounds")
        return forward(self, batch)

    monkeypatch.setattr(Distiller, "forward", failing)
    with pytest.raises(RuntimeError, match="index out of bounds"):
        run_distill(recipe(), output=tmp_path / "sound")
    poison(monkeypatch, 4, with_nan)
    with pytest.raises(NonFiniteLossError, match="nan at step 4"):
        run_distill(recipe(), output=tmp_path / "poisoned")
