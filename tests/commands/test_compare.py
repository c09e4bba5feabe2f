"""``gdetkd compare``: the table, its files, and the trials."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli.assembly import build_split, labels, resolve_runtime
from gdetkd_cli.commands import compare, run_compare
from gdetkd_cli.compare import trials
from gdetkd_cli.compare.table import Comparison
from gdetkd_cli.compare.trials import Trial, build_trial, find_finished_trials, run_trials
from gdetkd_cli.engine.events import Event, Note, Phase
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DataError, GDetKDError, ModelError, RecipeError, RunFolderError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.intervals import interval_over_seeds_and_images
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, CocoData, FolderData, Recipe


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """Plain training, one baseline and one that cannot be, two seeds."""
    folder = tmp_path_factory.mktemp("compare") / "table"
    recipe = toy.recipe(steps=3, student="retinanet", evaluate_every=2)
    return folder, run_compare(recipe, methods=("none", "pkd", "class_kd"), seeds=2, output=folder)


def test_rows_and_files(compared: tuple[Path, Comparison]) -> None:
    folder, found = compared
    plain, pkd, refused = found.rows
    assert [list(r.ap) for r in found.rows] == [[0, 1], [0, 1], []]
    assert plain.difference is None
    assert plain.interval is None
    assert pkd.difference == pytest.approx(sum(pkd.ap[s] - plain.ap[s] for s in (0, 1)) / 2)
    assert pkd.image_deviation is not None and pkd.seed_deviation is not None
    differences = [pkd.ap[seed] - plain.ap[seed] for seed in (0, 1)]
    assert pkd.interval == interval_over_seeds_and_images(differences, pkd.image_deviation, 4)
    assert pkd.seed_deviation == pytest.approx(abs(differences[0] - differences[1]) / 2**0.5)
    with found.table.open(newline="") as file:
        (line,) = [line for line in csv.DictReader(file) if line["method"] == "pkd"]
    assert (line["images"], line["folds"], line["fold_deviation"]) == ("4", "", "")
    for name in ("seed_deviation", "image_deviation"):
        assert float(line[name]) == pytest.approx(getattr(pkd, name), abs=1e-3)
    assert pkd.seconds_per_step is not None
    assert pkd.seconds_per_step > 0
    assert pkd.peak_memory_mb is not None
    assert pkd.peak_memory_mb > 50
    assert refused.mean is None
    assert len(found.failures) == 2
    assert (
        "class_kd, 3 steps, seed 0: Error: distill.class_kd: predictions can be compared between" in found.failures[0]
    )
    assert found.teacher_ap is not None
    with found.trials.open(newline="") as file:
        trials = list(csv.DictReader(file))
    assert [(c["method"], c["steps"], c["seed"]) for c in trials] == [
        ("none", "3", "0"),
        ("pkd", "3", "0"),
        ("none", "3", "1"),
        ("pkd", "3", "1"),
    ]
    metrics = json.loads((folder / "pkd-3-1" / "run" / "metrics.json").read_text())
    assert float(trials[3]["AP"]) == pytest.approx(metrics["AP"], abs=1e-3)
    with (folder / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert [(c["method"], c["seed"], c["step"]) for c in curves] == [
        (trial["method"], trial["seed"], step) for trial in trials for step in ("2", "3")
    ]
    assert float(curves[-1]["AP"]) == pytest.approx(metrics["AP"])
    assert found.plot.stat().st_size > 1000
    # The report shows trials of the first seed, so only these are measured.
    measured = {trial.folder.name: trial.run.measured.exists() for trial in find_finished_trials(folder)}
    assert measured == {"none-3-0": True, "pkd-3-0": True, "none-3-1": False, "pkd-3-1": False}
    # The intervals are made of the very detections that the metrics are.
    split = build_split(toy.recipe().data, "val")
    seen = build_trial(folder, "pkd", 3, 1).read_detections(split.class_names)
    assert evaluate_coco(split.records, split.class_names, seen).ap == metrics["AP"]


def test_only_unfinished_trials_are_run(compared: tuple[Path, Comparison]) -> None:
    folder, before = compared
    stamp = (folder / "none-3-0" / "run" / "student.pt").stat().st_mtime_ns
    shutil.rmtree(folder / "pkd-3-1")
    heard: list[Event] = []
    recipe = toy.recipe(steps=3, student="retinanet")
    again = run_compare(recipe, methods=("none", "pkd"), seeds=2, output=folder, observer=heard.append)

    assert (folder / "none-3-0" / "run" / "student.pt").stat().st_mtime_ns == stamp
    assert [event.title for event in heard if isinstance(event, Phase)] == ["pkd, 3 steps, seed 1"]
    assert Note("4 trials, 3 of them already finished") in heard
    assert [r.ap for r in again.rows] == [r.ap for r in before.rows[:2]]


def test_differences_to_another_method(compared: tuple[Path, Comparison]) -> None:
    folder, before = compared
    recipe = toy.recipe(steps=3, student="retinanet")
    found = run_compare(recipe, methods=("none",), seeds=2, baseline="pkd", output=folder)
    plain, pkd = found.rows
    assert pkd.difference is None and pkd.interval is None
    assert plain.difference == pytest.approx(-before.rows[1].difference)  # type: ignore[operator]
    assert plain.interval is not None and before.rows[1].interval is not None
    assert plain.interval == pytest.approx([-value for value in reversed(before.rows[1].interval)])
    with found.table.open(newline="") as file:
        assert {line["baseline"] for line in csv.DictReader(file)} == {"pkd"}
    with pytest.raises(RecipeError, match="the baseline 'cwd' is not in the table; expected one of none, pkd"):
        run_compare(recipe, methods=("none",), seeds=2, baseline="cwd", output=folder)


def test_earlier_methods_stay_in_the_table(compared: tuple[Path, Comparison]) -> None:
    folder, _ = compared
    found = run_compare(toy.recipe(steps=3, student="retinanet"), methods=("none",), seeds=1, output=folder)
    assert [(row.method, len(row.ap)) for row in found.rows] == [("none", 2), ("pkd", 2)]
    assert found.rows[1].difference is not None and found.rows[1].interval is not None
    with found.trials.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_another_recipe_is_rejected(compared: tuple[Path, Comparison]) -> None:
    folder, _ = compared
    other: dict[str, Any] = {"name": "other"}
    with pytest.raises(RunFolderError, match=r"has trials of a recipe that differs in name; choose another --output"):
        run_compare(toy.recipe(steps=3, student="retinanet").model_copy(update=other), methods=("none",), output=folder)


def test_a_teacher_that_changed_is_another_table(compared: tuple[Path, Comparison], tmp_path: Path) -> None:
    folder = shutil.copytree(compared[0], tmp_path / "table")
    recipe = toy.recipe(steps=3, student="retinanet")
    sources = json.loads((folder / "sources.json").read_text())
    assert None not in sources.values()
    (folder / "sources.json").write_text(json.dumps(sources | {"teacher's file": "0"}))
    with pytest.raises(
        RunFolderError, match=r"the teacher's file changed since the first trials in .*; choose another"
    ):
        run_compare(recipe, methods=("none",), output=folder)


def test_nothing_of_an_earlier_table_stays_without_its_trials(
    compared: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(compared[0], tmp_path / "table")
    for trial in find_finished_trials(folder):
        shutil.rmtree(trial.folder)
    shutil.rmtree(folder / "class_kd-3-0")
    shutil.rmtree(folder / "class_kd-3-1")
    (folder / "teacher.json").write_text('{"AP": 12.5}')
    (folder / "sources.json").write_text("{}")
    monkeypatch.setattr(compare, "run_trials", lambda *_, **__: [])
    again = run_compare(toy.recipe(steps=3, student="retinanet"), methods=("none",), output=folder)
    assert again.teacher_ap == compared[1].teacher_ap != 12.5
    assert json.loads((folder / "sources.json").read_text()).keys() > {"teacher's file"}


def test_other_precision_is_another_table_but_other_steps_or_seeds_are_not(compared: tuple[Path, Comparison]) -> None:
    folder, before = compared
    recipe = toy.recipe(steps=99, student="retinanet")
    again = run_compare(recipe, methods=("none",), steps=(3,), seeds=2, output=folder)
    assert again.rows[0].ap == before.rows[0].ap
    second = recipe.model_copy(update={"seed": 1})  # the second seed alone
    assert run_compare(second, methods=("none",), steps=(3,), seeds=1, output=folder).rows[0].ap == before.rows[0].ap
    half = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"precision": "bf16"})})
    with pytest.raises(RunFolderError, match=r"differs in runtime\.precision;"):
        run_compare(half, methods=("none",), output=folder)


def test_a_teacher_that_could_not_be_evaluated_is_tried_again(
    compared: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = compared
    (folder / "teacher.json").unlink()

    def fails(*_: object, **__: object) -> None:
        raise ModelError("not there yet")

    recipe = toy.recipe(steps=3, student="retinanet")
    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_eval", fails)
        assert run_compare(recipe, methods=("none",), seeds=1, output=folder).teacher_ap is None
    assert run_compare(recipe, methods=("none",), seeds=1, output=folder).teacher_ap == before.teacher_ap


# ----------------------------------------------------------------------------------------------------- what goes wrong


def test_a_trial_runs_exactly_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear scaling rule would make 3 steps 12 in each trial's own process."""
    recipe = toy.recipe(steps=3)
    train = recipe.train.model_copy(update={"reference_batch": 4 * recipe.train.batch_size})
    seen: list[Recipe] = []
    monkeypatch.setattr(compare, "run_trials", lambda recipes, *_, **__: seen.extend(recipes.values()) or [])
    run_compare(recipe.model_copy(update={"train": train}), methods=("none",), seeds=1, steps=(3,), output=tmp_path)

    assert [(one.train.steps, one.train.reference_batch) for one in seen] == [(3, None)]
    assert seen[0].train.optimizer.lr == pytest.approx(recipe.train.optimizer.lr / 4)


def test_a_failed_call_leaves_no_recipe(tmp_path: Path) -> None:
    """Data that could not be read are put right: the folder has no trials of another recipe."""
    wrong = toy.recipe(steps=3).model_copy(update={"data": CocoData(format="coco", root=tmp_path / "absent")})
    with pytest.raises(DataError, match="absent"):
        run_compare(wrong, methods=("none",), seeds=1, output=tmp_path / "table")
    assert len(run_compare(toy.recipe(steps=3), methods=("none",), seeds=1, output=tmp_path / "table").rows) == 1


def make_trial(folder: Path) -> Trial:
    trial = build_trial(folder, "none", 3, 0)
    trial.run.path.mkdir(parents=True)
    return trial


def test_a_trial_in_another_process_is_left_alone(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    (trial.run.path / "recipe.yaml").write_text("kept")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, sys; f = open({str(trial.run.path / '.lock')!r}, 'w'); "
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline()
    with pytest.raises(GDetKDError, match="another process is writing into"):
        trials.train_trial(trial, toy.recipe(steps=3))
    holder.communicate()
    assert (trial.run.path / "recipe.yaml").read_text() == "kept"
    with trial.run.lock():
        pass


@pytest.mark.usefixtures("new_processes")
def test_the_error_of_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    start = subprocess.Popen
    monkeypatch.setattr(trials.subprocess, "Popen", lambda _, **options: start(killed, **options))
    settings = resolve_runtime(toy.recipe().runtime)
    heard: list[Event] = []
    (notes,) = run_trials({make_trial(tmp_path): toy.recipe(steps=3)}, settings, jobs=1, observer=heard.append)
    assert "none, 3 steps, seed 0: SIGKILL ended its process, often for lack of memory" in notes

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(trials, "train_trial", fail)
    again = build_trial(tmp_path, "none", 3, 0)
    assert run_trials({again: toy.recipe(steps=3)}, settings, jobs=1, observer=heard.append) == [
        "none, 3 steps, seed 0: no memory left"
    ]


@pytest.mark.usefixtures("new_processes")
def test_simultaneous_trials_use_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    settings = replace(resolve_runtime(toy.recipe().runtime), device="cuda")
    together = threading.Barrier(2, timeout=300)
    given: list[str] = []

    class Ended:
        def __init__(self, _: list[str], *, env: dict[str, str], **__: Any) -> None:
            given.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self) -> int:
            together.wait()  # both trials of a pair are being trained
            return 0

    monkeypatch.setattr(trials.subprocess, "Popen", Ended)
    recipes = {build_trial(tmp_path, "none", 3, seed): toy.recipe(steps=3) for seed in range(4)}
    failures = run_trials(recipes, settings, jobs=2, observer=lambda _: None)
    assert len(failures) == 4  # no process ran: none has metrics
    assert sorted(given) == ["3", "3", "5", "5"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in trials.list_environments(settings, 3)] == ["0", "1", "0"]
    assert trials.list_environments(replace(settings, device="cpu"), 2) == [{}, {}]


def test_time_left_is_estimated_from_finished_trials(tmp_path: Path) -> None:
    plain, distilled, long, other = (
        build_trial(tmp_path, method, steps, 0)
        for method, steps in (("none", 10), ("sgfi", 10), ("sgfi", 40), ("ckd", 10))
    )
    left = trials.TimeLeft([plain, distilled, long, other], jobs=2)
    assert left.remove(plain) == (3, None)  # it was trained by an earlier call
    assert left.remove(distilled, 20.0) == (2, (40 * 2.0 + 10 * 2.0) / 2)
    assert left.remove(other, 10.0) == (1, 40 * 2.0)  # one process has the last trial to itself
    assert left.remove(long, 80.0) == (0, 0.0)


def test_images_that_the_teacher_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelled once, for plain training too; the trials' recipes have ordinary annotations."""
    images = tmp_path / "images"
    toy.write_images(images, [f"{i:02}.png" for i in range(12)])
    teacher = CheckpointDetector(arch="checkpoint", path="builtin:shapes-teacher")
    data = FolderData.model_validate({"format": "folder", "root": images, "labels": {"score": 0.05}})
    recipe = toy.recipe(steps=2).model_copy(update={"data": data, "teacher": teacher})
    folder = tmp_path / "table"
    heard: list[Event] = []
    found = run_compare(recipe, methods=("none", "sgfi"), seeds=1, output=folder, observer=heard.append)

    assert found.failures == ()
    assert [list(row.ap) for row in found.rows] == [[0], [0]]
    labelled = [note for note in heard if isinstance(note, Note) and "labelled by the teacher" in note.text]
    assert len(labelled) == 2  # training and validation images
    heard.clear()
    monkeypatch.setattr(labels, "label_split", None)  # they are not labelled again
    run_compare(recipe, methods=("none", "sgfi"), seeds=1, output=folder, observer=heard.append)
    assert Note("2 trials, 2 of them already finished") in heard


def test_a_signal_ends_the_processes_of_the_trials_and_the_table_can_be_continued(tmp_path: Path) -> None:
    table = tmp_path / "table"
    (tmp_path / "toy.yaml").write_text(dump_recipe(toy.recipe(steps=60, checkpoint_every=1000, log_every=1)))
    command = [sys.executable, "-m", "gdetkd_cli", "compare", str(tmp_path / "toy.yaml"), "--output", str(table)]
    command += ["--methods", "none,sgfi", "--seeds", "1", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    runs = [table / f"{method}-60-0" / "run" for method in ("none", "sgfi")]
    while process.poll() is None and not all((run / "metrics.jsonl").exists() for run in runs):
        time.sleep(0.05)
    process.terminate()
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert printed.splitlines()[-1] == "stopped by SIGTERM; run the same command again to continue"
    for run in runs:
        assert RunFolder(run).checkpoints().open_latest() is not None
        with RunFolder(run).lock():  # no process holds it any more
            pass
    subprocess.run(command, check=True, capture_output=True)
    assert (table / "table.csv").exists()
