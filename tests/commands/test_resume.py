"""A resumed run is the same run, and what has changed is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli.commands import resume_run, run_distill, run_train
from gdetkd_cli.commands.train import evaluate_split
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine.events import Event, StepDone
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.engine.signals import StopSignals
from gdetkd_cli.errors import RunFolderError, StoppedError
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import Optimizer, Recipe
from gdetkd_cli.structures import Batch, LossReport

Patch = pytest.MonkeyPatch


def lines(run: Path) -> list[dict[str, Any]]:
    """The log without the speed, which no run repeats."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in RunFolder(run).read_log()]


def same(first: Path, second: Path) -> bool:
    """Whether two runs have equal students, byte by byte, and equal logs."""
    return (first / "student.pt").read_bytes() == (second / "student.pt").read_bytes() and lines(first) == lines(second)


def at_step(step: int, number: int, patch: Patch) -> None:
    """Sends this process a signal within a step."""
    forward = Distiller.forward

    def forward_and_signal(self: Distiller, batch: Batch) -> LossReport:
        if self.step == step:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    patch.setattr(Distiller, "forward", forward_and_signal)


def stop(recipe: Recipe, run: Path, step: int, monkeypatch: Patch) -> Path:
    """Trains until a signal within ``step``."""
    with monkeypatch.context() as patch:
        at_step(step, signal.SIGTERM, patch)
        with pytest.raises(StoppedError):
            run_train(recipe, output=run)
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_a_run_after_its_step_and_it_resumes_to_the_same_bytes(
    number: signal.Signals, tmp_path: Path, monkeypatch: Patch
) -> None:
    recipe = toy.recipe(steps=8, log_every=3, evaluate_every=4)
    whole = run_distill(recipe, output=tmp_path / "whole").run
    with monkeypatch.context() as patch:
        at_step(4, number, patch)
        with pytest.raises(StoppedError, match=f"stopped by {number.name} after step 5") as stopped:
            run_distill(recipe, output=tmp_path / "run")
    assert stopped.value.exit_code == 128 + number
    assert stopped.value.__notes__ == [
        f"step 5 is saved; continue with `gdetkd distill --resume {tmp_path / 'run'}`",
    ]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    torch.manual_seed(99)  # the new process starts with other random numbers
    assert same(resume_run(tmp_path / "run").run, whole)
    assert (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_a_run_that_is_killed_in_an_evaluation_repeats_it(evaluation: int, tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = toy.recipe(steps=6, checkpoint_every=100, evaluate_every=2)
    whole = run_train(recipe, output=tmp_path / "whole").run
    calls = iter(range(9))

    def evaluate(*arguments: Any) -> Any:
        if next(calls) == evaluation:
            raise KeyboardInterrupt
        return evaluate_split(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("gdetkd_cli.commands.train.evaluate_split", evaluate)
        with pytest.raises(KeyboardInterrupt):
            run_train(recipe, output=tmp_path / "run")
    assert RunFolder(tmp_path / "run").checkpoints().list_steps()[-1] == 2 * (evaluation + 1)
    assert same(resume_run(tmp_path / "run").run, whole)


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = toy.recipe(steps=4, checkpoint_every=3)
    whole = run_train(recipe, output=tmp_path / "whole").run

    def fail(self: Distiller, batch: Batch) -> LossReport:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "forward", fail)
        with pytest.raises(RuntimeError, match="killed"):
            run_train(recipe, output=tmp_path / "run")
    with pytest.raises(RunFolderError, match="exists already"):
        run_train(recipe, output=tmp_path / "run")
    assert same(resume_run(tmp_path / "run").run, whole)


@pytest.mark.parametrize("asked", [True, False])
def test_a_resumed_run_is_measured_and_reported_on_request(asked: bool, tmp_path: Path, monkeypatch: Patch) -> None:
    done: list[str] = []
    for name in ("add_measurement", "add_report"):
        monkeypatch.setattr(f"gdetkd_cli.commands.train.{name}", lambda *_, name=name: done.append(name))
    run = run_distill(toy.recipe(steps=1), output=tmp_path / "run", report=False, measure=False).run
    assert done == []
    resume_run(run, steps=2, report=asked, measure=asked)
    assert done == (["add_measurement", "add_report"] if asked else [])


def test_a_run_that_was_killed_while_it_was_measured_is_completed(tmp_path: Path, monkeypatch: Patch) -> None:
    done: list[str] = []

    def measure(*_: Any) -> None:
        done.append("measured")
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("gdetkd_cli.commands.train.add_measurement", measure)
    monkeypatch.setattr("gdetkd_cli.commands.train.add_report", lambda *_: done.append("reported"))
    with pytest.raises(KeyboardInterrupt):
        run_distill(toy.recipe(steps=2), output=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.metrics.exists() and not folder.card.exists()
    before = folder.student.read_bytes()
    resume_run(tmp_path / "run")
    assert done == ["measured", "measured", "reported"] and folder.card.exists()
    assert folder.student.read_bytes() == before


def test_a_requeued_job_may_name_other_places_of_the_same_data(tmp_path: Path, monkeypatch: Patch) -> None:
    recipe, run = coco_recipe(tmp_path / "one", boxes=2), tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(1, signal.SIGUSR1, patch)
        with pytest.raises(StoppedError, match="SIGUSR1"):
            run_train(recipe, output=run, requeue=True)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": tmp_path / "two"})})
    assert run_train(moved, output=run, requeue=True).steps == 3
    assert load_recipe(run / "recipe.yaml").data.root == tmp_path / "two"  # type: ignore[union-attr]
    coco_recipe(tmp_path / "two", boxes=1)
    with pytest.raises(RunFolderError, match="training images and annotations changed"):
        run_train(moved, output=run, requeue=True)


def test_signals_of_two_senders_stop_a_run_once() -> None:
    """A terminal or a scheduler signals all processes, and ``compare`` passes its own signal on."""
    signals = StopSignals()
    with signals.deferred():
        signals._handle(signal.SIGINT, None)
        signals._handle(signal.SIGTERM, None)
        assert signals.received == signal.SIGINT
        with pytest.raises(StoppedError):
            signals._handle(signal.SIGINT, None)


def test_an_evaluation_between_two_log_lines_takes_no_time_off_the_steps(tmp_path: Path, monkeypatch: Patch) -> None:
    forward = Distiller.forward

    def forward_slowly(self: Distiller, batch: Batch) -> LossReport:
        time.sleep(0.2)
        return forward(self, batch)

    monkeypatch.setattr(Distiller, "forward", forward_slowly)
    result = run_train(toy.recipe(steps=4, log_every=4, evaluate_every=3), output=tmp_path / "run")
    assert result.seconds_per_step > 0.2


def test_the_time_left_counts_the_steps_before_the_resume(tmp_path: Path, monkeypatch: Patch) -> None:
    """The first log line covers steps of the stopped process, too: their time and their number."""
    run = stop(toy.recipe(steps=5, log_every=3), tmp_path / "run", 1, monkeypatch)
    monkeypatch.setattr("gdetkd_cli.engine.readings.Window.measure_seconds", lambda self: float(self.steps))
    events: list[Event] = []
    resume_run(run, observer=events.append, measure=False)
    assert [event.eta_seconds for event in events if isinstance(event, StepDone)] == [2.0, 0.0]


def test_a_requeued_job_starts_continues_and_ends(tmp_path: Path, monkeypatch: Patch) -> None:
    recipe, run = toy.recipe(steps=5, checkpoint_every=2), tmp_path / "run"
    whole = run_train(recipe, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_step(2, signal.SIGUSR1, patch)
        with pytest.raises(StoppedError):
            run_train(recipe, output=run, requeue=True)
    done = run_train(recipe, output=run, requeue=True)
    assert same(run, whole.run)
    assert run_train(recipe, output=run, requeue=True) == done  # nothing is left to do
    assert resume_run(run).metrics == whole.metrics
    other = toy.recipe(steps=7, checkpoint_every=2)
    with pytest.raises(RunFolderError, match=r"another recipe \(train.steps was 5 and is 7\); choose another --output"):
        run_train(other, output=run, requeue=True)


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    constant = {"name": "constant"}
    whole = run_train(toy.recipe(steps=7, schedule=constant), output=tmp_path / "whole").run
    run = run_train(toy.recipe(steps=4, schedule=constant), output=tmp_path / "run").run
    with pytest.raises(RunFolderError, match=r"has done 4 steps, but its recipe has 3; .*add --steps N with N above 4"):
        resume_run(run, steps=3)
    assert resume_run(run, steps=7).steps == 7
    assert (run / "student.pt").read_bytes() == (whole / "student.pt").read_bytes()
    assert load_recipe(run / "recipe.yaml").train.steps == 7


def test_an_extended_run_that_is_killed_before_its_next_checkpoint_goes_on(tmp_path: Path, monkeypatch: Patch) -> None:
    run = run_train(toy.recipe(steps=2, checkpoint_every=100), output=tmp_path / "run", measure=False).run

    def fail(self: Distiller, batch: Batch) -> LossReport:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "forward", fail)
        with pytest.raises(RuntimeError, match="killed"):
            resume_run(run, steps=3, measure=False)
    assert resume_run(run, measure=False).steps == 3


def test_the_learning_rate_of_an_extended_run_follows_the_new_schedule(tmp_path: Path) -> None:
    run = run_train(toy.recipe(steps=4), output=tmp_path / "run").run
    longer = run_train(toy.recipe(steps=8), output=tmp_path / "longer").run
    resume_run(run, steps=8)
    rates = {path: [line["lr"] for line in lines(path) if "lr" in line][4:] for path in (run, longer)}
    assert rates[run] == rates[longer]


def change_recipe(run: Path, **train: Any) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    (run / "recipe.yaml").write_text(dump_recipe(changed))


def test_a_changed_recipe_is_refused_without_force(tmp_path: Path, monkeypatch: Patch) -> None:
    run = stop(toy.recipe(steps=4), tmp_path / "run", 1, monkeypatch)
    change_recipe(run, clip_norm=1.0, checkpoint_every=50)  # how often it is saved changes no number
    with pytest.raises(RunFolderError, match=r"step 2: train.clip_norm was 10.0 and is 1.0. Undo this, or add --force"):
        resume_run(run)
    assert resume_run(run, force=True).steps == 4


def test_forced_settings_of_the_optimizer_are_used(tmp_path: Path, monkeypatch: Patch) -> None:
    run = stop(toy.recipe(steps=4), tmp_path / "run", 1, monkeypatch)
    change_recipe(run, optimizer=Optimizer(name="sgd"))
    with pytest.raises(RunFolderError, match="does not fit this run: its optimizer was another one"):
        resume_run(run, force=True)
    change_recipe(run, optimizer=Optimizer(weight_decay=0.5))
    resume_run(run, force=True, measure=False)
    state = torch.load(run / "resume" / "step-00000004" / "state.pt", weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0]


def test_changed_data_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    recipe = coco_recipe(tmp_path / "data", boxes=2)
    run = stop(recipe, tmp_path / "run", 1, monkeypatch)
    coco_recipe(tmp_path / "data", boxes=1)
    with pytest.raises(RunFolderError, match="training images and annotations changed; validation images and"):
        resume_run(run)


def test_moved_data_are_accepted(tmp_path: Path, monkeypatch: Patch) -> None:
    run = stop(coco_recipe(tmp_path / "data", boxes=2), tmp_path / "run", 1, monkeypatch)
    (tmp_path / "data").rename(tmp_path / "moved")
    recipe = load_recipe(run / "recipe.yaml")
    data = recipe.data.model_copy(update={"root": tmp_path / "moved"})
    (run / "recipe.yaml").write_text(dump_recipe(recipe.model_copy(update={"data": data})))
    assert resume_run(run).steps == 3


def coco_recipe(root: Path, *, boxes: int) -> Recipe:
    """A recipe on four images with ``boxes`` objects each."""
    names = [f"{i}.png" for i in range(4)]
    toy.write_images(root / "images", names)
    tables = {
        "images": [{"id": i, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 9 * i + k, "image_id": i, "category_id": 1, "bbox": [k, k, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(4)
            for k in range(boxes)
        ],
    }
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(tables))
    plain = toy.recipe(steps=3).model_dump(mode="json") | {"data": {"format": "coco", "root": str(root)}}
    return Recipe.model_validate(plain | {"teacher": None, "distill": None})


def test_a_full_disk_leaves_the_checkpoint_and_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(dump_recipe(toy.recipe(steps=6, checkpoint_every=2)))
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "gdetkd_cli",
        "train",
        "--recipe",
        str(tmp_path / "toy.yaml"),
        "--output",
        str(run),
    ]
    whole = subprocess.run(command, check=False, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    size = (run / "student.pt").stat().st_size
    log = size // 2  # the log and the recipe fit, a file of weights does not

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (log, log))

    full = tmp_path / "full"
    command[-1] = str(full)
    ended = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limit)
    assert ended.returncode == 1
    assert "could not be written: it needs" in ended.stderr
    assert "Free some space, then run the command again" in ended.stderr
    assert not list(full.glob("*.pt"))
    assert not list(full.rglob("*.new"))
    assert RunFolder(full).checkpoints().list_steps() == []
    command = [*command[:4], "--resume", str(full)]
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert same(full, run)


def test_the_best_student_is_kept(tmp_path: Path, monkeypatch: Patch) -> None:
    constant = {"name": "constant"}
    recipe = toy.recipe(steps=6, evaluate_every=2, schedule=constant)
    at_four = run_train(toy.recipe(steps=4, schedule=constant), output=tmp_path / "four").run
    found = iter([10.0, 30.0, 20.0])

    def evaluate(*arguments: Any) -> Any:
        return replace(evaluate_split(*arguments), ap=next(found))

    monkeypatch.setattr("gdetkd_cli.commands.train.evaluate_split", evaluate)
    run = run_train(recipe, output=tmp_path / "run").run
    assert (run / "best.pt").read_bytes() == (at_four / "student.pt").read_bytes()
    assert (run / "student.pt").read_bytes() != (at_four / "student.pt").read_bytes()
