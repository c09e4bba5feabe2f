"""The trackers that a recipe names: what they receive, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import toy
from accelerate import tracking

from gdetkd_cli.commands import plan_distill, run_train
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe.schema import Recipe, Tracker


def with_trackers(*names: str) -> Recipe:
    fields = toy.recipe(steps=2, evaluate_every=1).model_dump(mode="json")
    return Recipe.model_validate(fields | {"runtime": fields["runtime"] | {"trackers": names}})


class Remembering(tracking.GeneralTracker):
    """Stands for wandb."""

    name = "wandb"
    requires_logging_directory = False
    started: ClassVar[list[Any]] = []
    settings: ClassVar[dict[str, Any]] = {}
    lines: ClassVar[list[Any]] = []

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.started.append((project, options))

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.update(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> type[Remembering]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Remembering)
    monkeypatch.setattr(tracking, "_available_trackers", list(map(tracking.LoggerType, ("wandb", "tensorboard"))))
    for kept in (Remembering.started, Remembering.settings, Remembering.lines):
        kept.clear()
    return Remembering


def test_the_names_are_those_that_accelerate_knows() -> None:
    assert set(get_args(Tracker)) == set(tracking.LOGGER_TYPE_TO_CLASS)


def test_tensorboard_is_the_default(tmp_path: Path) -> None:
    assert toy.recipe().runtime.trackers == ["tensorboard"]
    run = run_train(toy.recipe(steps=1), output=tmp_path / "run").run
    assert len(list((run / "tensorboard").rglob("events.out.tfevents*"))) == 1


@pytest.mark.filterwarnings("error:.*log_with.*")
def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    run = run_train(with_trackers(), output=tmp_path / "run").run
    assert not (run / "tensorboard").exists()
    assert len([line for line in RunFolder(run).read_log() if "loss" in line]) == 2


def test_a_tracker_gets_the_log_and_the_recipe(tmp_path: Path, wandb: type[Remembering]) -> None:
    run = run_train(with_trackers("wandb", "tensorboard"), output=tmp_path / "run").run
    assert wandb.started == [("toy", {"name": "run"})]
    assert wandb.settings["train.steps"] == 2
    assert wandb.settings["train.optimizer.name"] == "adamw"
    assert [step for step, _ in wandb.lines] == [1, 1, 2, 2]
    logged = [line for line in RunFolder(run).read_log() if "loss" in line]
    assert wandb.lines[0][1] == {name: value for name, value in logged[0].items() if name != "step"}
    assert {"evaluation/AP", "evaluation/AP50"} <= wandb.lines[1][1].keys()
    assert list((run / "tensorboard").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType("tensorboard")])
    for start in (plan_distill, lambda recipe: run_train(recipe, output=tmp_path / "run")):
        with pytest.raises(RecipeError, match=r"names mlflow, which is not installed; .* installed ones: tensorboard"):
            start(with_trackers("mlflow"))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: type[Remembering]
) -> None:
    def fail(self: Remembering) -> None:
        raise OSError("no API key")

    monkeypatch.setattr(wandb, "start", fail)
    with pytest.raises(
        RecipeError, match=r"runtime.trackers \(wandb\) does not start \(OSError: no API key\); set it up"
    ):
        run_train(with_trackers("wandb"), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
