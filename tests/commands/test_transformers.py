"""Runs with DETR-like students and teachers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from query_models import make_config
from transformers import AutoModelForObjectDetection

from gdetkd_cli.commands import run_distill, run_eval, run_export, run_probe, run_teach, run_train
from gdetkd_cli.commands.probe import ProbeOptions
from gdetkd_cli.commands.train import resume_run
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.transformers import save_pretrained
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import Recipe


def make_recipe(student: dict[str, object], teacher: dict[str, object] | None = None, **train: int) -> Recipe:
    fields = toy.recipe(**train).model_dump(mode="json")
    fields["student"] = student
    if teacher is not None:
        fields["teacher"] = teacher
    return Recipe.model_validate(fields)


STUDENT = {"arch": "transformers", "config": make_config("d_fine"), "image_size": [64, 96]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled D-FINE after four steps."""
    folder = tmp_path_factory.mktemp("query") / "run"
    return run_distill(make_recipe(STUDENT, steps=4, checkpoint_every=2), output=folder).run


def test_a_taught_folder_replaces_a_teacher_with_queries(run: Path, tmp_path: Path) -> None:
    """Levels, hidden states and predictions are stored, and the decoder for its transfer."""
    teacher = {"arch": "checkpoint", "path": str(run)}
    recipe = make_recipe(STUDENT, teacher, steps=3)
    run_distill(recipe, output=tmp_path / "live")
    run_teach(recipe, output=tmp_path / "knowledge")
    stored = make_recipe(STUDENT, {"arch": "knowledge", "path": str(tmp_path / "knowledge")}, steps=3)
    run_distill(stored, output=tmp_path / "stored")
    before, now = (toy.read_losses(tmp_path / name)[0] for name in ("live", "stored"))
    assert before["sgfi"] > 0
    assert now["sgfi"] == pytest.approx(before["sgfi"], rel=0.05)  # a teacher of four steps has nearly constant maps
    for name in ("own", "ckd", "class_kd", "box_kd"):
        assert now[name] == pytest.approx(before[name], rel=1e-3), name


def test_the_run_has_a_folder_that_transformers_loads(run: Path) -> None:
    model = AutoModelForObjectDetection.from_pretrained(run / "pretrained")
    saved = torch.load(run / "student.pt", weights_only=True)["model"]
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in model.state_dict().items())
    assert not (run / "student").exists()
    terms = (run / "metrics.jsonl").read_text()
    assert '"sgfi"' in terms and '"ckd"' in terms


def test_eval_and_probe_accept_the_run_and_the_folder(run: Path, tmp_path: Path) -> None:
    own = run_eval(str(run), data=None)
    shutil.copy(run / "recipe.yaml", run / "pretrained" / "recipe.yaml")
    other = run_eval(str(run / "pretrained"), data=None)
    assert (own.format, other.format) == ("run", "transformers")
    assert own.metrics.ap == other.metrics.ap
    report = run_probe(str(run / "pretrained"), ProbeOptions(size=(64, 96)))  # as the model resizes images
    assert [level.stride for level in report.levels] == [(8, 8), (16, 16), (32, 32)]


def test_a_killed_run_resumes_to_the_same_student(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "part")
    shutil.rmtree(part / "resume" / "step-00000004")
    (part / "student.pt").unlink()
    resume_run(part)
    assert (part / "student.pt").read_bytes() == (run / "student.pt").read_bytes()


def test_the_folder_teaches(run: Path, tmp_path: Path) -> None:
    teacher: dict[str, object] = {"arch": "transformers", "model": str(run / "pretrained")}
    fcos: dict[str, object] = toy.detector("fcos")
    result = run_distill(make_recipe(fcos, teacher, steps=2), output=tmp_path / "run")
    assert '"sgfi"' in (result.run / "metrics.jsonl").read_text()


def test_two_decoders_share_predictions_and_the_head(run: Path, tmp_path: Path) -> None:
    loaded = catalog.load(run / "student.pt")
    torch.manual_seed(0)
    for parameter in loaded.detector.module.parameters():  # a body without training gives features near 0
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    save_pretrained(loaded.detector, loaded.description, tmp_path / "teacher")
    teacher: dict[str, object] = {"arch": "transformers", "model": str(tmp_path / "teacher")}
    notes: list[str] = []
    result = run_distill(
        make_recipe(STUDENT, teacher, steps=1),
        output=tmp_path / "run",
        observer=lambda event: notes.append(getattr(event, "text", "")),
    )
    log = (result.run / "metrics.jsonl").read_text()
    assert '"class_kd"' in log and '"box_kd"' in log
    assert "pair: homogeneous, query -> query" in notes
    assert any("head transfer: copied from the teacher: " in note for note in notes)


def test_plain_training_starts_from_the_folder(run: Path, tmp_path: Path) -> None:
    student: dict[str, object] = {"arch": "transformers", "model": str(run / "pretrained")}
    result = run_train(make_recipe(student, steps=2), output=tmp_path / "run")
    assert (result.run / "pretrained" / "model.safetensors").exists()


def test_export_writes_a_file_that_agrees(run: Path, tmp_path: Path) -> None:
    loaded = catalog.load(run / "student.pt")
    torch.manual_seed(0)
    for parameter in loaded.detector.module.parameters():  # after four steps all scores are equal, in any order
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    catalog.save(tmp_path / "student.pt", loaded.detector, loaded.description)
    (file,) = run_export(str(tmp_path), onnx=True, torchscript=False, output=None).files
    assert file.parity.passed


def test_only_backbones_are_compiled(tmp_path: Path) -> None:
    recipe = make_recipe(STUDENT, steps=1)
    recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"compile": True})})
    with pytest.raises(ModelError, match=r"QueryModel has none; set runtime\.compile to false"):
        run_distill(recipe, output=tmp_path / "run")


def test_the_code_in_the_model_card_runs(run: Path) -> None:
    toy.write_images(run, ["street.jpg"])
    code = re.findall(r"```python\n(.*?)\n```", (run / "README.md").read_text(), re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
