"""The demo at toy size: two students side by side, a table, a image, a checked ONNX file."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli.commands import demo, run_train
from gdetkd_cli.engine import device
from gdetkd_cli.engine.events import Evaluated, Event
from gdetkd_cli.errors import NonFiniteLossError
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The toy pair in the demo's place, its teacher a file."""
    small = toy.recipe(steps=2)
    teacher = run_train(small, detector="teacher", output=tmp_path / "teacher").run
    recipe = small.model_copy(update={"teacher": CheckpointDetector(arch="checkpoint", path=str(teacher))})
    monkeypatch.setattr(demo, "load_recipe", lambda *_: recipe)
    return recipe


@pytest.mark.parametrize("cores", [1, 4])
def test_the_demo(cores: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other on one core, else side by side: the same students."""
    for module in (demo, device):
        monkeypatch.setattr(module, "count_cores", lambda: cores)
    seen: list[Event] = []
    result = demo.run_demo(output=tmp_path / "out", observer=seen.append)

    assert result.gain == pytest.approx((result.distilled.metrics.ap or 0) - (result.student.metrics.ap or 0))
    assert result.onnx_parity
    assert result.image.stat().st_size > 0
    assert len([event for event in seen if isinstance(event, Evaluated)]) == 2
    assert result.distilled.parameters == result.student.parameters < result.teacher.parameters
    again = run_train(recipe, output=tmp_path / "again").run
    alone = tmp_path / "out" / "alone"
    ours, theirs = (torch.load(run / "student.pt", weights_only=True)["model"] for run in (alone, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_failure_does_not_wait_for_the_other_student(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "count_cores", lambda: 4)

    def fail(*_: Any, **__: Any) -> None:
        raise NonFiniteLossError("the loss is nan")

    monkeypatch.setattr(demo, "run_distill", fail)
    endless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 1_000_000})})
    monkeypatch.setattr(demo, "load_recipe", lambda *_: endless)
    with pytest.raises(NonFiniteLossError):
        demo.run_demo(output=tmp_path / "out")
    assert not multiprocessing.active_children()
