"""Tables of methods: which recipes they run, what is run again, and what they say."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import toy

from gdetkd_cli.errors import RecipeError, RunFolderError
from gdetkd_cli.recipe.methods import DEFAULT, TERMS, recipe_of
from gdetkd_cli.recipe.schema import SGFI, Recipe
from gdetkd_cli.results import Comparison, MethodRow
from gdetkd_cli.runs import run_compare
from gdetkd_cli.runs.compare import _notes
from gdetkd_cli.training.events import Event, Note, Phase

# ------------------------------------------------------------------------------------------------------ the methods


def terms_of(recipe: Recipe) -> set[str]:
    assert recipe.distill is not None
    return {name for name in TERMS if getattr(recipe.distill, name) is not None}


def test_every_method_is_the_recipe_with_other_terms() -> None:
    recipe = toy.recipe()
    made = {method: recipe_of(recipe, method, steps=9, seed=4) for method in DEFAULT}
    for method, one in made.items():
        assert (one.train.steps, one.seed, one.student, one.data) == (9, 4, recipe.student, recipe.data)
        if method in TERMS:
            assert terms_of(one) == {method}
            assert one.distill is not None
            assert one.distill.head_transfer is False
    assert made["none"].teacher is None
    assert made["none"].distill is None
    assert made["gdetkd"].distill == recipe.distill


def test_terms_are_joined_and_keep_the_recipes_settings() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    own = recipe.distill.model_copy(update={"sgfi": SGFI(weight=3.0), "ckd": None})
    one = recipe_of(recipe.model_copy(update={"distill": own}), "sgfi+ckd+head", steps=1, seed=0)
    assert terms_of(one) == {"sgfi", "ckd"}
    assert one.distill is not None
    assert one.distill.sgfi == SGFI(weight=3.0)
    assert one.distill.head_transfer is True


@pytest.mark.parametrize("method", ["pdk", "sgfi+", "head", ""])
def test_methods_that_there_are_not(method: str) -> None:
    with pytest.raises(RecipeError, match=r"there is no method .*; expected none, gdetkd, or terms joined by '\+'"):
        recipe_of(toy.recipe(), method, steps=1, seed=0)


def test_a_recipe_without_a_teacher() -> None:
    with pytest.raises(RecipeError, match="no teacher or no distill block: nothing to compare"):
        recipe_of(toy.recipe().model_copy(update={"teacher": None}), "none", steps=1, seed=0)


# ---------------------------------------------------------------------------------------------------------- the table


def row(steps: int, ap: float, method: str = "none") -> MethodRow:
    return MethodRow(method=method, steps=steps, ap={0: ap}, mean=ap)


def test_what_a_table_can_show_is_said() -> None:
    assert _notes([row(100, 30.0)], 40.0) == [
        "whether plain training is at its plateau is not told by these budgets; one twice as long tells"
    ]
    speed, climbing = _notes([row(100, 30.0), row(200, 41.0)], 40.0)
    assert speed == (
        "at 200 steps plain training reaches 41.0 AP, the teacher 40.0: what distillation adds here is speed, not a "
        "better end"
    )
    assert climbing == "plain training gains +11.0 AP from 100 to 200 steps: not yet its plateau"
    assert _notes([row(100, 30.0), row(200, 30.5)], 40.0)[-1].endswith("steps: its plateau")
    assert _notes([row(30, 0.2), row(60, 0.6)], 40.0)[-1].endswith("steps: not yet its plateau")  # it has hardly begun


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """Plain training, one rival and one that cannot be, two seeds."""
    folder = tmp_path_factory.mktemp("compare") / "table"
    recipe = toy.recipe(steps=3, student="retinanet")
    return folder, run_compare(recipe, methods=("none", "pkd", "class_kd"), seeds=2, output=folder)


def test_rows_and_files(compared: tuple[Path, Comparison]) -> None:
    folder, found = compared
    plain, pkd, refused = found.rows
    assert [list(r.ap) for r in found.rows] == [[0, 1], [0, 1], []]
    assert plain.difference is None
    assert plain.interval is None
    assert pkd.difference == pytest.approx(sum(pkd.ap[s] - plain.ap[s] for s in (0, 1)) / 2)
    assert pkd.interval is not None
    assert pkd.seconds_per_step is not None
    assert pkd.seconds_per_step > 0
    assert pkd.peak_memory_mb is not None
    assert pkd.peak_memory_mb > 50
    assert refused.mean is None
    assert len(found.failures) == 2
    assert "class_kd, 3 steps, seed 0: Error: distill.class_kd: predictions of the RoI heads" in found.failures[0]
    assert found.teacher_ap is not None
    with found.cells.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [(c["method"], c["steps"], c["seed"]) for c in cells] == [
        ("none", "3", "0"),
        ("pkd", "3", "0"),
        ("none", "3", "1"),
        ("pkd", "3", "1"),
    ]
    metrics = json.loads((folder / "pkd-3-1" / "run" / "metrics.json").read_text())
    assert float(cells[3]["AP"]) == pytest.approx(metrics["AP"], abs=1e-3)
    assert found.plot.stat().st_size > 1000


def test_a_finished_cell_is_not_run_again_and_a_lost_one_is(compared: tuple[Path, Comparison]) -> None:
    folder, before = compared
    stamp = (folder / "none-3-0" / "run" / "student.pt").stat().st_mtime_ns
    (folder / "pkd-3-1" / "detections.pt").unlink()
    heard: list[Event] = []
    recipe = toy.recipe(steps=3, student="retinanet")
    again = run_compare(recipe, methods=("none", "pkd"), seeds=2, output=folder, observer=heard.append)

    assert (folder / "none-3-0" / "run" / "student.pt").stat().st_mtime_ns == stamp
    assert [event.title for event in heard if isinstance(event, Phase)] == ["pkd, 3 steps, seed 1"]
    assert Note("4 cells, 3 of them finished before") in heard
    assert [r.ap for r in again.rows] == [r.ap for r in before.rows[:2]]


def test_what_was_asked_for_before_stays_in_the_table(compared: tuple[Path, Comparison]) -> None:
    folder, _ = compared
    found = run_compare(toy.recipe(steps=3, student="retinanet"), methods=("none",), seeds=1, output=folder)
    assert [(row.method, len(row.ap)) for row in found.rows] == [("none", 2), ("pkd", 2)]
    assert found.rows[1].difference is not None and found.rows[1].interval is not None
    with found.cells.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_another_recipe_gets_no_place_in_the_table(compared: tuple[Path, Comparison]) -> None:
    folder, _ = compared
    other: dict[str, Any] = {"name": "other"}
    with pytest.raises(RunFolderError, match=r"has cells of a recipe that differs in name; choose another --output"):
        run_compare(toy.recipe(steps=3, student="retinanet").model_copy(update=other), methods=("none",), output=folder)
