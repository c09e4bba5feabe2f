"""``compare --folds``: what each run trains on, which teacher it has, and what the pooled table is made of."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli import assembly
from gdetkd_cli.commands import compare, run_compare, run_train
from gdetkd_cli.compare.folds import list_folds, plan_fold_teachers, pool_teacher_ap, select_fold
from gdetkd_cli.compare.table import Comparison, make_rows, select_predicted, write_notes
from gdetkd_cli.compare.trials import Trial, build_teacher_trial, build_trial, find_finished_trials
from gdetkd_cli.data.bad_images import BadImages
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.events import Event, Note, Phase
from gdetkd_cli.errors import DataError, RecipeError, RunFolderError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.intervals import interval_over_folds
from gdetkd_cli.evaluation.stored import read_detections, write_detections
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, CocoData, Fold, FolderData, Recipe, SyntheticData
from gdetkd_cli.structures import Detections

FOLDS = 2


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return recipe.model_copy(update=fields)


def taught_by(path: Path | str, **options: Any) -> Recipe:
    return changed(toy.recipe(**options), teacher=CheckpointDetector(arch="checkpoint", path=str(path)))


def every_image(recipe: Recipe) -> Split:
    return assembly.build_all_folds(select_fold(recipe.data, Fold(number=1, of=FOLDS)))


def ids(recipe: Recipe, which: assembly.Which) -> set[int]:
    return {record.image_id for record in assembly.build_split(recipe.data, which).records}


def a_run(folder: Path, recipe: Recipe) -> Path:
    """A run's folder as far as its recipe and the name of its student go."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "student.pt").touch()
    return folder


# ------------------------------------------------------------------------------------------------------ a whole table


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, Comparison]:
    """Two folds of 14 scenes, whose teacher is a run on the same scenes; one seed."""
    root = tmp_path_factory.mktemp("folds")
    run_train(toy.recipe(steps=2), detector="teacher", output=root / "teacher")
    recipe = taught_by(root / "teacher", steps=2, evaluate_every=1)
    folder = root / "table"
    return folder, recipe, run_compare(recipe, methods=("none", "sgfi"), seeds=1, folds=FOLDS, output=folder)


def pooled(trials: Iterable[Path], split: Split) -> float | None:
    found: dict[int, Detections] = {}
    for trial in trials:
        stored = read_detections(trial / "run" / "detections.npz").by_image
        assert not found.keys() & stored.keys()
        found |= stored
    assert found.keys() == {record.image_id for record in split.records}
    return evaluate_coco(split.records, split.class_names, found).ap


def test_ap_is_that_of_all_folds_together(crossed: tuple[Path, Recipe, Comparison]) -> None:
    folder, recipe, found = crossed
    assert found.failures == ()
    split = every_image(recipe)
    assert len(split) == 14
    for row in found.rows:
        trials = [folder / f"{row.method}-2-0-fold-{number}-of-2" for number in (1, 2)]
        assert row.ap == {0: pooled(trials, split)}
    plain, sgfi = found.rows
    assert plain.interval is None
    assert sgfi.difference is not None
    aps = {
        (method, number): json.loads((folder / f"{method}-2-0-fold-{number}-of-2/run/metrics.json").read_text())["AP"]
        for method in ("none", "sgfi")
        for number in (1, 2)
    }
    by_fold = [aps["sgfi", number] - aps["none", number] for number in (1, 2)]
    assert sgfi.interval == interval_over_folds(sgfi.difference, stdev(by_fold), 2)
    assert found.interval_over == "folds"


def test_files_name_the_fold(crossed: tuple[Path, Recipe, Comparison]) -> None:
    folder, _, found = crossed
    with found.trials.open(newline="") as file:
        trials = list(csv.DictReader(file))
    expected = [("none", "1"), ("none", "2"), ("sgfi", "1"), ("sgfi", "2")]
    assert [(trial["method"], trial["fold"]) for trial in trials] == expected
    with (folder / "curves.csv").open(newline="") as file:
        assert [(line["method"], line["fold"], line["step"]) for line in csv.DictReader(file)] == [
            (*trial, step) for trial in expected for step in ("1", "2")
        ]
    with (folder / "pooled.csv").open(newline="") as file:
        assert [float(line["AP"]) for line in csv.DictReader(file)] == [
            pytest.approx(row.mean, abs=1e-3) for row in found.rows
        ]
    with found.table.open(newline="") as file:
        (line,) = [line for line in csv.DictReader(file) if line["method"] == "sgfi"]
    assert (line["folds"], line["images"], line["image_deviation"]) == ("2", "14", "")
    assert line["interval_over"] == "folds"
    assert float(line["fold_deviation"]) == pytest.approx(found.rows[1].fold_deviation, abs=1e-3)
    assert found.plot.stat().st_size > 1000


def test_no_run_and_no_teacher_sees_what_it_is_tested_on(crossed: tuple[Path, Recipe, Comparison]) -> None:
    folder, recipe, found = crossed
    held_out: list[set[int]] = []
    for number in (1, 2):
        teacher = folder / f"teacher-fold-{number}-of-2"
        own = load_recipe(teacher / "run" / "recipe.yaml")
        assert own.distill is None and own.train.steps == 2
        for method in ("none", "sgfi"):
            trial = load_recipe(folder / f"{method}-2-0-fold-{number}-of-2" / "run" / "recipe.yaml")
            assert ids(trial, "val") == ids(own, "val")
            for one in (trial, own):
                assert not ids(one, "train") & ids(trial, "val")
                assert ids(one, "train") | ids(trial, "val") == set(range(1, 15))
            assert trial.teacher == (
                None if method == "none" else CheckpointDetector(arch="checkpoint", path=str(teacher / "run"))
            )
        held_out.append(ids(own, "val"))
    assert held_out[0].isdisjoint(held_out[1])
    teachers = [folder / f"teacher-fold-{number}-of-2" for number in (1, 2)]
    assert found.teacher_ap == pooled(teachers, every_image(recipe))


def test_what_is_finished_is_not_run_again(crossed: tuple[Path, Recipe, Comparison]) -> None:
    folder, recipe, before = crossed
    shutil.rmtree(folder / "sgfi-2-0-fold-2-of-2")
    heard: list[Event] = []
    again = run_compare(
        recipe, methods=("none",), seeds=1, folds=FOLDS, baseline="sgfi", output=folder, observer=heard.append
    )
    assert Note("2 teachers of folds, 2 of them already finished") in heard
    assert Note("2 trials, 2 of them already finished") in heard
    assert not [event for event in heard if isinstance(event, Phase)]
    # Half of SGFI's images have no detections any more: no AP, and no difference to it.
    assert [(row.method, list(row.ap), row.difference) for row in again.rows] == [
        ("none", [0], None),
        ("sgfi", [], None),
    ]
    assert "sgfi, 2 steps, seed 0 is not in the table: only 1 of 2 folds are finished" in again.notes
    heard.clear()
    again = run_compare(recipe, methods=("sgfi",), seeds=1, folds=FOLDS, output=folder, observer=heard.append)
    assert [event.title for event in heard if isinstance(event, Phase)] == ["sgfi, 2 steps, seed 0, fold 2 of 2"]
    assert {row.method: row.ap for row in again.rows} == {row.method: row.ap for row in before.rows}


def test_other_folds_are_another_table(crossed: tuple[Path, Recipe, Comparison]) -> None:
    folder, recipe, _ = crossed
    with pytest.raises(
        RunFolderError, match="has trials with 2 folds; continue with --folds 2, or choose another --output"
    ):
        run_compare(recipe, methods=("none",), seeds=1, output=folder)
    with pytest.raises(RunFolderError, match="has trials with 2 folds"):
        run_compare(recipe, methods=("none",), seeds=1, folds=3, output=folder)


# ------------------------------------------------------------------------------------- rows of trials made by hand


def by_hand(folder: Path, recipe: Recipe) -> None:
    """Trials of two methods, two seeds and two folds that detect the truth, off by other numbers of pixels in each."""
    generator = torch.Generator().manual_seed(0)
    for method, off in (("none", 3.0), ("sgfi", 1.5)):
        for seed in (0, 1):
            for fold in (Fold(number=number, of=FOLDS) for number in (1, 2)):
                trial = build_trial(folder, method, 5, seed, fold)
                split = assembly.build_split(select_fold(recipe.data, fold), "val")
                found = {
                    record.image_id: Detections(
                        boxes=record.boxes + off * torch.randn(record.boxes.shape, generator=generator),
                        scores=torch.rand(len(record.labels), generator=generator),
                        labels=record.labels,
                    )
                    for record in split.records
                }
                trial.run.path.mkdir(parents=True)
                write_detections(trial.run.detections, split.class_names, found)
                metrics = evaluate_coco(split.records, split.class_names, found).to_json()
                spent = {"seconds_per_step": 0.1 * fold.number, "peak_memory_mb": 100.0}
                trial.run.metrics.write_text(json.dumps(metrics | spent))


def test_rows_pool_folds_and_intervals_are_over_them(tmp_path: Path) -> None:
    recipe = toy.recipe()
    by_hand(tmp_path, recipe)
    finished = find_finished_trials(tmp_path, FOLDS)
    assert len(finished) == 8 and find_finished_trials(tmp_path) == {} == find_finished_trials(tmp_path, 3)
    split = every_image(recipe)
    (plain, sgfi), runs = make_rows([(5, "none")], finished, split, "none", FOLDS)
    for row in (plain, sgfi):
        for seed in (0, 1):
            trials = [tmp_path / f"{row.method}-5-{seed}-fold-{number}-of-2" for number in (1, 2)]
            assert row.ap[seed] == runs[row.method, 5, seed]["AP"] == pooled(trials, split)
    assert plain.seconds_per_step == pytest.approx(0.15)
    assert sgfi.difference == pytest.approx(sum(sgfi.ap[seed] - plain.ap[seed] for seed in (0, 1)) / 2)
    assert sgfi.image_deviation is None and sgfi.seed_deviation is not None

    def of_fold(method: str, number: int) -> float:
        aps = [float(fact["AP"]) for trial, fact in finished.items() if is_of(trial, method, number)]
        assert len(aps) == 2
        return sum(aps) / 2

    by_fold = [of_fold("sgfi", number) - of_fold("none", number) for number in (1, 2)]
    assert sgfi.fold_deviation == pytest.approx(abs(by_fold[0] - by_fold[1]) / 2**0.5)
    half = 12.706 * sgfi.fold_deviation / 2**0.5  # t(1) = 12.706
    assert sgfi.interval == pytest.approx((sgfi.difference - half, sgfi.difference + half), abs=1e-2)


def test_images_that_no_trial_could_read_are_not_in_the_table(tmp_path: Path) -> None:
    recipe = toy.recipe()
    by_hand(tmp_path, recipe)
    finished = find_finished_trials(tmp_path, FOLDS)
    split = replace(every_image(recipe), bad=BadImages(1))
    lost, *others = [record.image_id for record in split.records]
    for trial in finished:
        found = trial.read_detections(split.class_names)
        found.pop(lost, None)
        write_detections(trial.run.detections, split.class_names, found)
    assert [record.image_id for record in select_predicted(split, finished).records] == others
    assert select_predicted(split, ()) is split
    assert select_predicted(replace(split, bad=None), finished).records == split.records


def test_the_teachers_ap_is_over_the_classes_of_the_comparison(tmp_path: Path) -> None:
    recipe = toy.recipe()
    split = every_image(recipe)
    teachers = {}
    for fold in list_folds(recipe, FOLDS):
        held_out = assembly.build_split(select_fold(recipe.data, fold), "val")
        trial = build_teacher_trial(tmp_path, 5, 0, fold)
        trial.run.path.mkdir(parents=True)
        found = {
            record.image_id: Detections(record.boxes[own], torch.ones(int(own.sum())), record.labels[own])
            for record in held_out.records
            for own in (record.labels == 1,)  # it knows the first class only
        }
        write_detections(trial.run.detections, held_out.class_names, found)
        trial.run.metrics.write_text("{}")
        teachers[fold] = (trial, recipe)
    first = [
        replace(
            record,
            boxes=record.boxes[record.labels == 1],
            labels=record.labels[record.labels == 1],
            truth=[item for item in record.truth if item["category_id"] == 1],
        )
        for record in split.records
    ]
    assert any(record.truth for record in first)
    assert pool_teacher_ap(teachers, replace(split, class_names=split.class_names[:1], records=first)) == 100
    ap = pool_teacher_ap(teachers, split)
    assert ap is not None and ap < 50


def is_of(trial: Trial, method: str, number: int) -> bool:
    return trial.method == method and trial.fold is not None and trial.fold.number == number


def test_a_seed_without_all_folds_is_left_out(tmp_path: Path) -> None:
    recipe = toy.recipe()
    by_hand(tmp_path, recipe)
    (tmp_path / "sgfi-5-1-fold-2-of-2" / "run" / "detections.npz").unlink()
    finished = find_finished_trials(tmp_path, FOLDS)
    (plain, sgfi), _ = make_rows([], finished, every_image(recipe), "none", FOLDS)
    assert (list(plain.ap), list(sgfi.ap)) == ([0, 1], [0])
    assert sgfi.difference == pytest.approx(sgfi.ap[0] - plain.ap[0])
    notes = write_notes([plain, sgfi], 50.0, finished, FOLDS)
    assert "sgfi, 5 steps, seed 1 is not in the table: only 1 of 2 folds are finished" in notes
    assert not any("one seed" in note for note in notes)  # folds give an interval all the same


# ------------------------------------------------------------------------------------------------ data and teachers


def test_every_seed_and_method_has_the_same_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Trial, Recipe] = {}
    monkeypatch.setattr(compare, "run_trials", lambda recipes, *_, **__: seen.update(recipes) or [])
    heard: list[Event] = []
    teacher = taught_by("builtin:shapes-teacher")
    run_compare(teacher, methods=("none", "sgfi"), seeds=2, folds=3, output=tmp_path, observer=heard.append)
    assert len(seen) == 12
    for number in (1, 2, 3):
        held_out = [ids(recipe, "val") for trial, recipe in seen.items() if trial.fold and trial.fold.number == number]
        assert len(held_out) == 4 and all(one == held_out[0] for one in held_out)
    (note,) = [event.text for event in heard if isinstance(event, Note) and "all folds use" in event.text]
    assert note.startswith("all folds use the teacher builtin:shapes-teacher; if it was trained on these images")
    assert all(recipe.teacher in (None, teacher.teacher) for recipe in seen.values())
    assert (tmp_path / "teacher.json").exists()


@pytest.mark.parametrize("folds", [1, 0, -2])
def test_too_few_folds(folds: int) -> None:
    with pytest.raises(RecipeError, match=f"--folds must be 2 or more: .*; got {folds}"):
        run_compare(toy.recipe(), methods=("none",), folds=folds)


def test_more_folds_than_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="14 images cannot be divided into 15 folds"):
        run_compare(toy.recipe(), methods=("none",), folds=15, output=tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FolderData(format="folder", labels="teacher"), "requires annotations for every image"),
        (CocoData(format="coco", labels="teacher"), "requires annotations for every image"),
        (SyntheticData(fold=Fold(number=1, of=2)), "already selects a fold"),
    ],
)
def test_data_that_have_no_folds(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        list_folds(changed(toy.recipe(), data=data), 2)


def test_a_student_that_has_seen_the_images(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", toy.recipe())
    student = CheckpointDetector(arch="checkpoint", path=str(run))
    with pytest.raises(RecipeError, match=r"the student starts from .*run, which was trained on these images"):
        list_folds(changed(toy.recipe(), student=student), 2)


def plain(recipe: Recipe) -> Recipe:
    return changed(recipe, teacher=None, distill=None)


def test_a_teacher_on_other_data_is_taken_as_it_is(tmp_path: Path) -> None:
    other = changed(plain(toy.recipe()), data=SyntheticData(train_images=10, val_images=4, size=64, seed=7))
    for recipe in (taught_by(a_run(tmp_path / "run", other)), taught_by("builtin:shapes-teacher"), toy.recipe()):
        assert plan_fold_teachers(recipe, tmp_path, list_folds(recipe, 2)) == {}


def test_a_teacher_is_trained_anew_by_its_own_recipe(tmp_path: Path) -> None:
    own = plain(toy.recipe(steps=77))
    recipe = taught_by(a_run(tmp_path / "run", own))
    made = plan_fold_teachers(recipe, tmp_path / "table", list_folds(recipe, 2))
    for fold, (trial, made_of) in made.items():
        assert made_of == changed(own, data=own.data.model_copy(update={"fold": fold}), runtime=recipe.runtime)
        assert trial.folder == tmp_path / "table" / f"teacher-fold-{fold.number}-of-2"
        assert trial.title == f"teacher, 77 steps, seed 0, fold {fold.number} of 2"


def test_coco_data_are_the_same_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = CocoData(format="coco", root=tmp_path, classes=["cat"])
    own = changed(plain(toy.recipe()), data=CocoData(format="coco"))
    recipe = changed(taught_by(a_run(tmp_path / "run", own)), data=here)
    made = plan_fold_teachers(recipe, tmp_path / "table", [Fold(number=1, of=2)])
    ((_, made_of),) = made.values()
    assert isinstance(made_of.data, CocoData) and made_of.data.classes is None  # its run's own

    other = changed(recipe, data=here.model_copy(update={"val": Path("test.json")}))
    with pytest.raises(RecipeError, match="trained on another selection of these data"):
        plan_fold_teachers(other, tmp_path / "table", [Fold(number=1, of=2)])
    elsewhere = changed(recipe, data=CocoData(format="coco", root=tmp_path / "elsewhere"))
    assert plan_fold_teachers(elsewhere, tmp_path / "table", [Fold(number=1, of=2)]) == {}


def test_teachers_that_cannot_be_trained_anew(tmp_path: Path) -> None:
    folds = [Fold(number=1, of=2)]
    more = changed(plain(toy.recipe()), data=SyntheticData(train_images=80, val_images=4, size=64))
    with pytest.raises(RecipeError, match="trained on another selection of these data"):
        plan_fold_teachers(taught_by(a_run(tmp_path / "more", more)), tmp_path, folds)
    with pytest.raises(RecipeError, match="depends on another run on these images"):
        plan_fold_teachers(taught_by(a_run(tmp_path / "distilled", toy.recipe())), tmp_path, folds)
    exported = a_run(tmp_path / "exported", plain(toy.recipe())) / "student.onnx"
    exported.touch()
    with pytest.raises(RecipeError, match="belongs to a run on these images; use the run folder as the teacher"):
        plan_fold_teachers(taught_by(exported), tmp_path, folds)
