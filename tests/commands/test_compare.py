"""Tables of methods: which recipes they run, what is run again, and what they say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli.assembly import build_split, labels, resolve_runtime
from gdetkd_cli.commands import compare, run_compare
from gdetkd_cli.commands.compare import transfers_head
from gdetkd_cli.compare import trials
from gdetkd_cli.compare.table import Comparison, MethodRow, notes_of
from gdetkd_cli.compare.trials import Trial, run_trials, trial_of
from gdetkd_cli.engine.events import Event, Note, Phase
from gdetkd_cli.errors import DataError, ModelError, RecipeError, RunFolderError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.intervals import interval_over_seeds_and_images
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.distillation import SGFI, FitNet, GTMask
from gdetkd_cli.recipe.methods import DEFAULT, TERMS, list_default_methods, select_method
from gdetkd_cli.recipe.schema import CheckpointDetector, CocoData, FolderData, Recipe
from gdetkd_cli.structures import Detections

# ------------------------------------------------------------------------------------------------------ the methods


def terms_of(recipe: Recipe) -> set[str]:
    assert recipe.distill is not None
    return {name for name in TERMS if getattr(recipe.distill, name) is not None}


def test_every_method_is_the_recipe_with_other_terms() -> None:
    recipe = toy.recipe()
    made = {method: select_method(recipe, method, steps=9, seed=4) for method in DEFAULT}
    for method, one in made.items():
        assert (one.train.steps, one.seed, one.student, one.data) == (9, 4, recipe.student, recipe.data)
        if method not in ("none", "gdetkd"):
            assert terms_of(one) == {"gt_mask" if method == "gt_box" else method}
            assert one.distill is not None
            assert one.distill.head_transfer is False
    assert made["none"].teacher is None
    assert made["none"].distill is None
    assert made["gdetkd"].distill == recipe.distill


def test_terms_are_joined_and_keep_the_recipes_settings() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    own = recipe.distill.model_copy(update={"sgfi": SGFI(weight=3.0), "ckd": None})
    one = select_method(recipe.model_copy(update={"distill": own}), "sgfi+ckd+head", steps=1, seed=0)
    assert terms_of(one) == {"sgfi", "ckd"}
    assert one.distill is not None
    assert one.distill.sgfi == SGFI(weight=3.0)
    assert one.distill.head_transfer is True


def test_squared_errors_weigh_as_sgfi_does() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    block = recipe.distill.model_copy(update={"sgfi": SGFI(weight=3.0), "fitnet": FitNet(weight=7.0)})
    made = select_method(
        recipe.model_copy(update={"distill": block}), "roi_imitation+fitnet+pkd", steps=1, seed=0
    ).distill
    assert made is not None and made.roi_imitation and made.fitnet and made.pkd
    assert (made.roi_imitation.weight, made.fitnet.weight, made.pkd.weight) == (3.0, 7.0, "auto")


def test_squared_errors_warm_up_as_sgfi_does() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    block = recipe.distill.model_copy(update={"sgfi": SGFI(warmup_steps=7)})
    made = select_method(recipe.model_copy(update={"distill": block}), "gt_box+pkd", steps=1, seed=0).distill
    assert made is not None and made.gt_mask and made.pkd
    assert (made.gt_mask.warmup_steps, made.pkd.warmup_steps) == (7, 0)


def test_the_box_mask_is_a_method_of_its_own() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    own = recipe.distill.model_copy(update={"gt_mask": GTMask(weight=3.0)})
    recipe = recipe.model_copy(update={"distill": own})
    masks = {}
    for method in ("gt_mask", "gt_box+head"):
        made = select_method(recipe, method, steps=1, seed=0).distill
        assert made is not None and made.gt_mask
        masks[method] = (made.gt_mask.mask, made.gt_mask.weight, made.head_transfer)
    assert masks == {"gt_mask": ("anchors", 3.0, False), "gt_box+head": ("boxes", 3.0, True)}
    with pytest.raises(
        RecipeError, match=r"'gt_mask\+gt_box' has the term gt_mask twice; name gt_box or the other one"
    ):
        select_method(recipe, "gt_mask+gt_box", steps=1, seed=0)


def test_methods_of_a_table_that_names_none() -> None:
    assert list_default_methods(head=False) == DEFAULT
    with_head = list_default_methods(head=True)
    assert [name for name in with_head if not name.endswith("+head")] == list(DEFAULT)
    assert {name.removesuffix("+head") for name in with_head if name.endswith("+head")} == {*DEFAULT[1:-1]}


@pytest.mark.parametrize(
    ("student", "head_transfer", "head"),
    [
        ("faster-rcnn", "auto", True),
        ("faster-rcnn", False, False),
        ("retinanet", "auto", False),  # its head is another
    ],
)
def test_a_table_has_heads_where_gdetkd_has_one(student: str, head_transfer: Any, head: bool) -> None:
    recipe = toy.recipe(student=student)
    assert recipe.distill is not None
    block = recipe.distill.model_copy(update={"head_transfer": head_transfer})
    recipe = recipe.model_copy(update={"distill": block})
    assert transfers_head(require_distillation(recipe)) is head


@pytest.mark.parametrize("method", ["pdk", "sgfi+", "head", ""])
def test_methods_that_there_are_not(method: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown method .*; expected none, gdetkd, or terms joined by '\+'"):
        select_method(toy.recipe(), method, steps=1, seed=0)


def test_a_recipe_without_a_teacher() -> None:
    with pytest.raises(RecipeError, match="has no `teacher:` block"):
        run_compare(toy.recipe().model_copy(update={"teacher": None}), methods=["none"])


# ---------------------------------------------------------------------------------------------------------- the table


def row(steps: int, ap: float, method: str = "none") -> MethodRow:
    return MethodRow(method=method, steps=steps, ap={0: ap}, mean=ap)


def test_what_a_table_can_show_is_said() -> None:
    assert notes_of([row(100, 30.0)], 40.0) == [
        "whether plain training is at its plateau is not told by these budgets; one twice as long tells"
    ]
    speed, climbing = notes_of([row(100, 30.0), row(200, 41.0)], 40.0)
    assert speed == (
        "at 200 steps plain training reaches 41.0 AP, the teacher 40.0: what distillation adds here is speed, not a "
        "better end"
    )
    assert climbing == "plain training gains +11.0 AP from 100 to 200 steps: not yet its plateau"
    assert notes_of([row(100, 30.0), row(200, 30.5)], 40.0)[-1].endswith("steps: its plateau")
    assert notes_of([row(30, 0.2), row(60, 0.6)], 40.0)[-1].endswith(
        "steps: not yet its plateau"
    )  # it has hardly begun


def test_a_plateau_is_told_by_the_seeds_that_both_budgets_have() -> None:
    """Seed 1 alone was run at both: +0.5; the means over all seeds would say +4."""
    half = MethodRow(method="none", steps=100, ap={0: 23.0, 1: 30.0}, mean=26.5)
    whole = MethodRow(method="none", steps=200, ap={1: 30.5}, mean=30.5)
    assert notes_of([half, whole], 40.0) == ["plain training gains +0.5 AP from 100 to 200 steps (1 seed): its plateau"]
    none = MethodRow(method="none", steps=200, ap={2: 30.5}, mean=30.5)
    assert "no seed in common" in notes_of([half, none], 40.0)[0]


def test_why_one_seed_has_no_interval_is_said() -> None:
    one = MethodRow(method="pkd", steps=100, ap={0: 33.0}, mean=33.0, difference=3.0, image_deviation=0.5)
    assert notes_of([row(100, 30.0), one], 40.0)[-1] == (
        "a difference of one seed has no interval, since one seed cannot show how far seeds differ; get more with "
        "`--seeds 3`"
    )
    two = replace(one, seed_deviation=1.0, interval=(1.0, 5.0))
    assert not any("interval" in note for note in notes_of([row(100, 30.0), two], 40.0))


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
    assert "class_kd, 3 steps, seed 0: Error: distill.class_kd: predictions of the RoI heads" in found.failures[0]
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
    # The intervals are made of the very detections that the metrics are.
    split = build_split(toy.recipe().data, "val")
    stored = torch.load(folder / "pkd-3-1" / "detections.pt", weights_only=True)
    seen = {number: Detections(**one) for number, one in stored.items()}
    assert evaluate_coco(split.records, split.class_names, seen).ap == metrics["AP"]


def test_a_finished_cell_is_not_run_again_and_a_lost_one_is(compared: tuple[Path, Comparison]) -> None:
    folder, before = compared
    stamp = (folder / "none-3-0" / "run" / "student.pt").stat().st_mtime_ns
    (folder / "pkd-3-1" / "detections.pt").unlink()
    heard: list[Event] = []
    recipe = toy.recipe(steps=3, student="retinanet")
    again = run_compare(recipe, methods=("none", "pkd"), seeds=2, output=folder, observer=heard.append)

    assert (folder / "none-3-0" / "run" / "student.pt").stat().st_mtime_ns == stamp
    assert [event.title for event in heard if isinstance(event, Phase)] == ["pkd, 3 steps, seed 1"]
    assert Note("4 trials, 3 of them finished before") in heard
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


def test_what_was_asked_for_before_stays_in_the_table(compared: tuple[Path, Comparison]) -> None:
    folder, _ = compared
    found = run_compare(toy.recipe(steps=3, student="retinanet"), methods=("none",), seeds=1, output=folder)
    assert [(row.method, len(row.ap)) for row in found.rows] == [("none", 2), ("pkd", 2)]
    assert found.rows[1].difference is not None and found.rows[1].interval is not None
    with found.trials.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_another_recipe_gets_no_place_in_the_table(compared: tuple[Path, Comparison]) -> None:
    folder, _ = compared
    other: dict[str, Any] = {"name": "other"}
    with pytest.raises(RunFolderError, match=r"has trials of a recipe that differs in name; choose another --output"):
        run_compare(toy.recipe(steps=3, student="retinanet").model_copy(update=other), methods=("none",), output=folder)


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


def test_a_budget_is_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear scaling rule would make 3 steps 12 in each trial's own process."""
    recipe = toy.recipe(steps=3)
    train = recipe.train.model_copy(update={"reference_batch": 4 * recipe.train.batch_size})
    seen: list[Recipe] = []
    monkeypatch.setattr(compare, "run_trials", lambda recipes, *_, **__: seen.extend(recipes.values()) or [])
    run_compare(recipe.model_copy(update={"train": train}), methods=("none",), seeds=1, steps=(3,), output=tmp_path)

    assert [(one.train.steps, one.train.reference_batch) for one in seen] == [(3, None)]
    assert seen[0].train.optimizer.lr == pytest.approx(recipe.train.optimizer.lr / 4)


def test_a_call_that_ran_nothing_claims_nothing(tmp_path: Path) -> None:
    """Data that could not be read are put right: the folder has no trials of another recipe."""
    wrong = toy.recipe(steps=3).model_copy(update={"data": CocoData(format="coco", root=tmp_path / "absent")})
    with pytest.raises(DataError, match="absent"):
        run_compare(wrong, methods=("none",), seeds=1, output=tmp_path / "table")
    assert len(run_compare(toy.recipe(steps=3), methods=("none",), seeds=1, output=tmp_path / "table").rows) == 1


def a_trial(folder: Path) -> Trial:
    trial = trial_of(folder, "none", 3, 0)
    trial.run.make()
    return trial


def test_a_cell_that_an_orphan_still_trains_is_left_alone(tmp_path: Path) -> None:
    trial = a_trial(tmp_path)
    (trial.run.path / "recipe.yaml").write_text("kept")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, sys; f = open({str(trial.run.path / '.lock')!r}, 'w'); "
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline()
    with pytest.raises(RunFolderError, match="another process is writing into"):
        trials.train_trial(trial, toy.recipe(steps=3), trials.Place("cpu"))
    holder.communicate()
    assert (trial.run.path / "recipe.yaml").read_text() == "kept"
    with trial.run.held():
        pass


def test_how_a_trial_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    run = subprocess.run
    monkeypatch.setattr(trials.subprocess, "run", lambda _, **options: run(killed, **options))
    settings = resolve_runtime(toy.recipe().runtime)
    heard: list[Event] = []
    (told,) = run_trials({a_trial(tmp_path): toy.recipe(steps=3)}, settings, jobs=1, observer=heard.append)
    assert "none, 3 steps, seed 0: its process was ended by SIGKILL (often: too little memory)" in told

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(trials, "train_trial", fail)
    assert run_trials({a_trial(tmp_path): toy.recipe(steps=3)}, settings, jobs=1, observer=heard.append) == [
        "none, 3 steps, seed 0: no memory left"
    ]


def test_simultaneous_runs_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    settings = replace(resolve_runtime(toy.recipe().runtime), device="cuda")
    together = threading.Barrier(2, timeout=60)
    given: list[str] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        together.wait()  # both trials of a pair are being trained
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return subprocess.CompletedProcess(command, 0)

    predicted: list[str] = []
    monkeypatch.setattr(trials.subprocess, "run", run)
    monkeypatch.setattr(trials, "_predict", lambda *args: predicted.append(args[3].device))
    recipes = {trial_of(tmp_path, "none", 3, seed): toy.recipe(steps=3) for seed in range(4)}
    failures = run_trials(recipes, settings, jobs=2, observer=lambda _: None)
    assert len(failures) == 4  # no process ran: none has metrics
    assert sorted(given) == ["3", "3", "5", "5"] and sorted(predicted) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place.device for place in trials.places(settings, 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in trials.places(settings, 3)] == ["0", "1", "0"]
    assert trials.places(replace(settings, device="cpu"), 2) == [trials.Place("cpu"), trials.Place("cpu")]


def test_time_left_is_told_by_the_cells_that_were_run(tmp_path: Path) -> None:
    plain, distilled, long, other = (
        trial_of(tmp_path, method, steps, 0)
        for method, steps in (("none", 10), ("sgfi", 10), ("sgfi", 40), ("ckd", 10))
    )
    left = trials.TimeLeft([plain, distilled, long, other], jobs=2)
    assert left.without(plain) == (3, None)  # it was trained by an earlier call
    assert left.without(distilled, 20.0) == (2, (40 * 2.0 + 10 * 2.0) / 2)
    assert left.without(other, 10.0) == (1, 40 * 2.0)  # one process has the last trial to itself
    assert left.without(long, 80.0) == (0, 0.0)


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
    assert Note("2 trials, 2 of them finished before") in heard
