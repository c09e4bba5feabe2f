"""How often a training step makes the host wait for the device: no more than is written here, and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
import waits
from test_second_device import OTHERS, runs_elsewhere, with_student

from gdetkd_cli import host, structures
from gdetkd_cli.commands import run_distill
from gdetkd_cli.engine.loop import Loop
from gdetkd_cli.recipe.distillation import Logit
from gdetkd_cli.recipe.schema import Recipe

# Why each stays. Levels are pooled one by one, so it must be known how many regions each has: one read for all levels
# of one detector. A dense student's candidates are chosen by where they lie and by what they overlap.
POOLED = {"pooling.py:pool_assigned": 1}
DENSE_CHOICE = {"dense.py:_select_candidates": 1, "regions.py:_compute_overlaps": 1}
READS = "readings.py:read"  # at log steps


def steps_counted(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """The waits of each step: the loop's own and all that it calls."""
    found: list[Counter[str]] = []
    step = Loop.take_step

    def counting(self: Loop, number: int, batch: Any) -> Any:
        with waits.counted() as own:
            done = step(self, number, batch)
        found.append(own)
        return done

    monkeypatch.setattr(Loop, "take_step", counting)
    with runs_elsewhere():
        run_distill(recipe, output=folder / "run")
    return found


def logged_late(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_every": 50, "steps": 3})})


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("student", ["faster-rcnn", "cascade-rcnn", "retinanet", "fcos"])
def test_a_distillation_step(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_counted(logged_late(with_student(student)), tmp_path, monkeypatch)
    allowed = POOLED if student.endswith("rcnn") else POOLED | DENSE_CHOICE
    assert len(steps) == 3
    for found in steps:
        assert dict(found) == allowed


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("pair", ["faster-rcnn to fcos", "two RetinaNets"])
def test_a_step_of_other_methods(pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if pair == "two RetinaNets":
        recipe = with_student("retinanet", teacher="retinanet", logit=Logit())
        allowed = POOLED | DENSE_CHOICE
    else:
        recipe = with_student("fcos", sgfi=None, **OTHERS)
        allowed = DENSE_CHOICE | {"pooling.py:pool_assigned": 2}  # the student's regions as well
    for found in steps_counted(logged_late(recipe), tmp_path, monkeypatch):
        assert dict(found) == allowed


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
def test_numbers_are_read_once_at_a_log_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = logged_late(with_student("faster-rcnn"))
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"log_every": 2})})
    steps = steps_counted(recipe, tmp_path, monkeypatch)

    assert [found[READS] for found in steps] == [0, 1, 0]


def test_what_waits_is_counted() -> None:
    regions = torch.tensor([0, 0, 1])
    with elsewhere.machine():
        away = regions.to(elsewhere.ELSEWHERE)
        for wait in (
            lambda: structures.count_by_image(away, 2),
            lambda: structures.Regions(away, away, away).are_candidates(),
            lambda: structures.Frame(away, away, (1, 1)).on_host(),
        ):
            with waits.counted() as found:
                wait()
            assert sum(found.values()) >= 1
            assert all(site.startswith("structures.py:") for site in found)
        with waits.counted() as found:
            structures.Regions(away, away, away, counts=(2, 1), all_candidates=True).per_image(2)
            structures.Frame.of(regions, regions, (1, 1), elsewhere.ELSEWHERE).on_host()
            host.copy_numbers([1, 2], away)
            away.sum()
        assert not found
