"""Several batches per step, averaged weights and early stopping, through whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from test_resume import change_recipe, lines, same, stop

from gdetkd_cli.commands import plan_distill, resume_run, run_distill, run_eval, run_train
from gdetkd_cli.commands.train import evaluate_split
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import RunFolderError
from gdetkd_cli.recipe.schema import Recipe, Train

Patch = pytest.MonkeyPatch
SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.0}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def state(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "resume" / f"step-{step:08}" / "state.pt", weights_only=True)


# ----------------------------------------------------------------------------------------------- several batches


def frozen_retinanet(**train: Any) -> Recipe:
    """RetinaNet's losses are means over images, and frozen normalization looks at no other image."""
    options = {"optimizer": SGD, "schedule": {"name": "constant", "warmup_steps": 0}} | train
    fields = toy.recipe(steps=2, student="retinanet", **options).model_dump(mode="json")
    fields["student"]["norm"] = "frozen"
    return Recipe.model_validate(fields)


def test_two_batches_of_two_train_a_detector_like_one_of_four(tmp_path: Path) -> None:
    whole = run_train(frozen_retinanet(batch_size=4), output=tmp_path / "whole").run
    parts = run_train(frozen_retinanet(batch_size=2, accumulate=2), output=tmp_path / "parts").run
    fresh = run_train(frozen_retinanet(batch_size=4, optimizer=SGD | {"lr": 1e-9}), output=tmp_path / "fresh").run
    first, second, start = (weights(run / "student.pt") for run in (whole, parts, fresh))
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    for one, two in zip(lines(whole), lines(parts), strict=True):
        assert one["step"] == two["step"]
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


def test_the_plan_counts_all_batches_of_a_step(monkeypatch: Patch) -> None:
    def measure(work: Callable[[], object], _device: torch.device) -> float:
        work()
        return 1.0

    monkeypatch.setattr("gdetkd_cli.commands.plan.measure_seconds", measure)
    one, three = (plan_distill(toy.recipe(accumulate=count)) for count in (1, 3))
    assert (one.batch_size, three.batch_size) == (2, 6)
    assert (one.seconds_per_step, three.seconds_per_step) == (2.0, 6.0)  # reading a batch, and learning from it
    assert three.estimated_seconds == pytest.approx(6 * three.seconds_per_step)


def test_the_plan_times_steps_after_a_warm_up(monkeypatch: Patch) -> None:
    data, training = 0.25, [90.0, 50.0, 3.0, 1.0, 2.0, 2.5, 1.5]
    of_the_teacher = [9.0, 9.0, 9.0]  # stored and read again, to plan a store
    seconds = iter([*(value for step in training for value in (data, step - data)), *of_the_teacher])

    def measure(work: Callable[[], object], _device: torch.device) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr("gdetkd_cli.commands.plan.measure_seconds", measure)
    plan = plan_distill(toy.recipe(steps=1))  # also of a recipe that is shorter
    assert plan.seconds_per_step == 2.0
    assert next(seconds, None) is None


# ---------------------------------------------------------------------------------------------- averaged weights


def test_the_averaged_student_is_the_one_that_is_evaluated_and_written(tmp_path: Path) -> None:
    schedule = {"name": "constant", "warmup_steps": 0}
    options = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "schedule": schedule}
    plain = run_distill(toy.recipe(**options), output=tmp_path / "plain").run
    result = run_distill(toy.recipe(**options, ema=0.15, evaluate_every=2), output=tmp_path / "run")
    run, expected = result.run, None
    for step in range(1, 5):
        raw = state(run, step)["distiller"]
        assert all(torch.equal(value, raw[name]) for name, value in state(plain, step)["distiller"].items())
        own = {name.removeprefix("student."): value for name, value in raw.items() if name.startswith("student.")}
        if expected is None:  # before the first step; its decay of 0.1 leaves little of it
            start = {name: (one - 0.9 * own[name]) / 0.1 for name, one in state(run, 1)["average"].items()}
            expected = start
        decay = min(0.15, step / (9 + step))
        expected = {name: decay * expected[name] + (1 - decay) * own[name] for name in own}
    assert expected is not None
    written = weights(run / "student.pt")
    for name, value in written.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)
    assert not all(torch.equal(value, weights(plain / "student.pt")[name]) for name, value in written.items())

    # Everything that a user sees is of the file that is written.
    again = run_eval(str(run), data=None, store=tmp_path / "again.npz")
    assert again.metrics.to_json() == result.metrics.to_json()
    stored, own_stored = np.load(run / "detections.npz"), np.load(tmp_path / "again.npz")
    np.testing.assert_allclose(stored["scores"], own_stored["scores"], atol=1e-5)
    assert json.loads((run / "metrics.json").read_text())["AP"] == result.metrics.ap


def test_the_best_student_is_the_averaged_one(tmp_path: Path, monkeypatch: Patch) -> None:
    scored(monkeypatch, [10.0, 5.0])
    run = run_train(toy.recipe(steps=4, evaluate_every=2, ema=0.9, keep_checkpoints=9), output=tmp_path / "run").run
    best = weights(run / "best.pt")
    average = state(run, 2)["average"]
    assert all(torch.equal(best[name], average[name]) for name in best)


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_average_is_the_same_to_the_last_bit(step: int, tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = toy.recipe(steps=6, ema=0.9, accumulate=2, evaluate_every=2, keep_checkpoints=9)
    whole = run_train(recipe, output=tmp_path / "whole").run
    run = stop(recipe, tmp_path / "run", step, monkeypatch)
    torch.manual_seed(99)
    assert same(resume_run(run).run, whole)
    first, second = (state(path, 6)["average"] for path in (whole, run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_an_average_can_start_in_the_middle_with_force(tmp_path: Path, monkeypatch: Patch) -> None:
    run = stop(toy.recipe(steps=4), tmp_path / "run", 1, monkeypatch)
    change_recipe(run, ema=0.5)
    with pytest.raises(RunFolderError, match=r"train.ema was null and is 0.5. Undo this, or add --force"):
        resume_run(run)
    resume_run(run, force=True)
    assert state(run, 4)["average"]


# ------------------------------------------------------------------------------------------------ early stopping


def scored(patch: Patch, found: list[float]) -> None:
    """Replaces the AP of the next evaluations."""
    left: Iterator[float] = iter(found)

    def evaluate(*arguments: Any) -> Any:
        return replace(evaluate_split(*arguments), ap=next(left))

    patch.setattr("gdetkd_cli.commands.train.evaluate_split", evaluate)


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def test_a_run_ends_when_the_ap_no_longer_rises(tmp_path: Path, monkeypatch: Patch) -> None:
    seen: list[Event] = []
    scored(monkeypatch, [10.0, 30.0, 30.0, 20.0, 99.0])
    recipe = toy.recipe(steps=20, evaluate_every=2, stop_after=2, log_every=50)
    result = run_train(recipe, output=tmp_path / "run", observer=seen.append)
    run = result.run
    assert (result.steps, result.metrics.ap) == (8, 20.0)
    stored = json.loads((run / "metrics.json").read_text())
    assert (stored["steps"], stored["AP"]) == (8, 20.0)
    end = (
        f"{run} is finished: it ended at step 8 of 20, after 2 evaluations without a higher AP (train.stop_after). To "
        f"train it further, raise train.stop_after in {run / 'recipe.yaml'}, or set it to null, and resume the run"
    )
    assert notes(seen)[-1] == end
    last = state(run, 8)["distiller"]
    assert all(torch.equal(value, last[f"student.{name}"]) for name, value in weights(run / "student.pt").items())
    assert not all(torch.equal(value, last[f"student.{name}"]) for name, value in weights(run / "best.pt").items())

    # Nothing is left to do, also for a job that starts again.
    seen.clear()
    assert resume_run(run, observer=seen.append) == result
    assert notes(seen) == [end]
    assert run_train(recipe, output=run, requeue=True) == result


def test_a_longer_patience_continues_an_ended_run(tmp_path: Path, monkeypatch: Patch) -> None:
    scored(monkeypatch, [30.0, 20.0, 40.0, 10.0, 10.0, 10.0])
    run = run_train(toy.recipe(steps=12, evaluate_every=2, stop_after=1), output=tmp_path / "run").run
    assert json.loads((run / "metrics.json").read_text())["steps"] == 4
    change_recipe(run, stop_after=2)
    result = resume_run(run)
    assert result.steps == 10  # 40 at step 6, then two below it
    assert [line["step"] for line in RunFolder(run).read_log() if "evaluation" in line] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("kill", ["student.pt", "metrics.json"])
def test_a_run_that_is_killed_at_its_early_end_ends_there(kill: str, tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = toy.recipe(steps=20, evaluate_every=2, stop_after=1, ema=0.9)
    scored(monkeypatch, [30.0, 20.0, 99.0])
    run = run_train(recipe, output=tmp_path / "run").run
    before = shutil.copytree(run, tmp_path / "before")
    (run / "metrics.json").unlink()
    if kill == "student.pt":
        (run / "student.pt").unlink()
    result = resume_run(run)
    assert (result.steps, result.metrics.ap) == (4, 20.0)
    assert same(run, before)


def test_a_resumed_run_goes_on_counting(tmp_path: Path, monkeypatch: Patch) -> None:
    scored(monkeypatch, [30.0, 20.0, 10.0])
    run = stop(toy.recipe(steps=20, evaluate_every=2, stop_after=2), tmp_path / "run", 4, monkeypatch)
    assert resume_run(run).steps == 6


def test_early_stopping_needs_evaluations() -> None:
    with pytest.raises(ValueError, match="stop_after counts evaluations, and evaluate_every is null"):
        Train(steps=5, stop_after=2)
