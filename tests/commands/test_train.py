"""Runs through ``gdetkd_cli.commands``: what is written, resumed, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gdetkd_cli.assembly import setup
from gdetkd_cli.assembly.setup import build_accelerator
from gdetkd_cli.commands import (
    check_recipe,
    plan_distill,
    profile_distill,
    run_compare,
    run_distill,
    run_eval,
    run_train,
)
from gdetkd_cli.detectors import catalog
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Evaluated, Event, Note, StepDone
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import NonFiniteLossError, RecipeError, RunFolderError
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import ComposedDetector, Recipe
from gdetkd_cli.structures import Batch, LossReport


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "student.pt", weights_only=True)["model"]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.draws
def test_a_run_leaves_everything_that_is_promised(tmp_path: Path) -> None:
    seen: list[Event] = []
    result = run_distill(toy.recipe(evaluate_every=3), output=tmp_path / "run", observer=seen.append)
    run = result.run
    files = ("recipe.yaml", "environment.json", "probe.json", "metrics.jsonl", "metrics.json", "student/__init__.py")
    for name in files:
        assert (run / name).stat().st_size > 0, name
    assert list((run / "images").glob("*.png"))
    assert list(run.rglob("events.out.tfevents*"))
    steps = [line for line in _lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        terms = {"sgfi", "ckd", "class_kd", "box_kd"}
        assert terms | {f"weight/{name}" for name in terms} | {"loss_classifier", "lr"} <= line.keys()
    assert [e.step for e in seen if isinstance(e, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in seen if isinstance(e, Evaluated)] == [3, 6]
    said = " ".join(e.text for e in seen if isinstance(e, Note))
    assert "pair: homogeneous, two-stage -> two-stage" in said
    assert "copied from the teacher: box_head, box_predictor (8 tensors)" in said
    again = load_recipe(run / "recipe.yaml")
    assert again.train == toy.recipe(evaluate_every=3).train
    environment = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert json.loads((run / "metrics.json").read_text())["AP"] == pytest.approx(result.metrics.ap)


def test_half_precision_trains_and_the_file_has_the_reported_ap(tmp_path: Path) -> None:
    """The loop evaluates in float32, as ``gdetkd eval`` does and as the student is shipped."""
    recipe = toy.recipe(steps=3)
    recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"precision": "bf16"})})
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate refuses two precisions within one process
    try:
        result = run_distill(recipe, output=tmp_path / "run")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)

    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "bf16"
    assert run_eval(str(tmp_path / "run"), data=None).metrics.to_json() == result.metrics.to_json()


def test_the_student_file_holds_the_student_alone_and_needs_no_gdetkd(tmp_path: Path) -> None:
    run = run_distill(toy.recipe(steps=1), output=tmp_path / "run").run
    detector = catalog.load(run / "student.pt").detector
    assert _weights(run).keys() == detector.module.state_dict().keys()
    image = torch.rand(3, 64, 64)
    torch.save(image, tmp_path / "image.pt")
    program = (
        "import sys; sys.modules['gdetkd_cli'] = None\n"  # importing it now fails
        "import torch, student\n"
        "model = student.load('student.pt')\n"
        "torch.save(model([torch.load('../image.pt')])[0], '../found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=run, check=True, env={"PYTHONPATH": str(run), "PATH": ""})
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    expected = detector.predict([image])[0]
    torch.testing.assert_close(found["boxes"].detach(), expected.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(found["scores"].detach(), expected.scores, atol=1e-5, rtol=0)


def test_all_weights_zero_is_the_plain_run(tmp_path: Path) -> None:
    weights = {name: {"weight": 0.0} for name in ("sgfi", "ckd", "class_kd", "box_kd")}
    recipe = toy.recipe()
    assert recipe.distill is not None
    distill = recipe.distill.model_dump() | weights | {"head_transfer": False}
    zero = recipe.model_validate(recipe.model_dump() | {"distill": distill})
    plain = run_train(recipe, output=tmp_path / "plain").run
    distilled = run_distill(zero, output=tmp_path / "zero").run
    assert _same(_weights(plain), _weights(distilled))
    assert not _same(_weights(plain), _weights(run_distill(recipe, output=tmp_path / "real").run))


class _Poison(torch.autograd.Function):
    """A loss that is finite, of which the gradient is not."""

    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def _scaled(settings: ComputeSettings, recipe: Recipe) -> Accelerator:
    """Half precision as CUDA has it: accelerate has none on a CPU."""
    accelerator = build_accelerator(settings, recipe)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=16.0), True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    forward = Distiller.forward

    def poisoned(self: Distiller, batch: Batch) -> LossReport:
        report = forward(self, batch)
        return report if self.step < 5 else replace(report, total=_Poison.apply(report.total))

    monkeypatch.setattr(Distiller, "forward", poisoned)
    if half:
        monkeypatch.setattr(setup, "build_accelerator", _scaled)
    # The scaler passes over an overflow 4 times, until its scale is 1.
    at = 9 if half else 5
    with pytest.raises(NonFiniteLossError, match=rf"the gradient's norm is nan at step {at} \(loss_classifier \d"):
        run_distill(toy.recipe(steps=40), output=tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = RunFolder(tmp_path / "run").checkpoints().open_latest()
    assert checkpoint is not None
    assert all(value.isfinite().all() for value in checkpoint.read_state()["distiller"].values())
    norms = [line["gradient_norm"] for line in _lines(tmp_path / "run")]
    assert all(isinstance(norm, float) for norm in norms[:5])
    assert norms[5:] == [None] * (at - 5)


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="exists already"):
        run_train(toy.recipe(), output=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_distilling_without_a_teacher_says_what_is_missing(tmp_path: Path) -> None:
    recipe = toy.recipe().model_copy(update={"teacher": None})
    with pytest.raises(RecipeError, match="no `teacher:` block"):
        run_distill(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _untaught() -> Recipe:
    return toy.recipe().model_copy(update={"teacher": ComposedDetector.model_validate(toy.detector(width=12))})


def test_a_teacher_of_fresh_weights_teaches_nothing(tmp_path: Path) -> None:
    recipe = _untaught()
    with pytest.raises(RecipeError, match="teacher of the recipe 'toy' has no trained weights; train it"):
        run_distill(recipe, output=tmp_path / "run")
    with pytest.raises(RecipeError, match="has no trained weights"):
        run_compare(recipe, methods=("none",), output=tmp_path / "table")
    (tmp_path / "toy.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(RecipeError, match="has no trained weights"):
        run_eval(str(tmp_path / "toy.yaml"), data=None)
    assert [file.name for file in tmp_path.iterdir()] == ["toy.yaml"]


def test_a_look_at_a_teacher_of_fresh_weights_says_so() -> None:
    assert any("has no trained weights; train it" in note for note in plan_distill(_untaught()).notes)
    assert not any("trained weights" in note for note in plan_distill(toy.recipe()).notes)
    told: list[Event] = []
    check_recipe(_untaught(), "toy.yaml", observer=told.append)
    assert any(isinstance(note, Note) and "has no trained weights; train it" in note.text for note in told)


def test_training_the_teacher_of_a_recipe_that_is_trained_says_so(tmp_path: Path) -> None:
    seen: list[Event] = []
    run = run_train(toy.recipe(steps=1), detector="teacher", output=tmp_path / "run", observer=seen.append).run
    assert Note("the teacher has weights; training continues from them") in seen
    assert _weights(run)["backbone.body.conv1.weight"].shape[0] == 12


@pytest.mark.parametrize("student", ["faster-rcnn", "retinanet"])
def test_the_plan_runs_and_writes_nothing(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_distill(toy.recipe(student=student))
    assert not list(tmp_path.iterdir())
    weights = {term.name: term.weight for term in plan.terms}
    heterogeneous = student == "retinanet"
    assert plan.pair == (
        "heterogeneous, two-stage -> dense" if heterogeneous else "homogeneous, two-stage -> two-stage"
    )
    assert weights == {
        "sgfi": 10.0,
        "ckd": 0.05 if heterogeneous else 1.0,  # auto: what suits the student
        "class_kd": None if heterogeneous else 1.0,
        "box_kd": None if heterogeneous else 1.0,
    }
    assert {"sgfi", "ckd"} <= plan.losses.keys()
    assert [round(level.stride[0]) for level in plan.student.levels][:4] == [4, 8, 16, 32]
    assert plan.estimated_seconds == pytest.approx(6 * plan.seconds_per_step)


def test_the_profile_names_every_phase() -> None:
    profile = profile_distill(toy.recipe(steps=20), steps=2)
    assert {"data", "teacher", "student forward", "term sgfi", "term ckd", "backward", "optimizer"} <= set(
        profile.seconds
    )
    assert profile.ratio > 0
    assert profile.step > 0
    assert profile.images_per_second == pytest.approx(2 / profile.step)
    assert profile.recipe_hours == pytest.approx(20 * profile.step / 3600)
    assert profile.loader_images_per_second > 0
    assert profile.peak_memory_mb > 50
