"""The model card of a run: what it states, what it leaves out, and that its code runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy
from huggingface_hub import ModelCard

from gdetkd_cli import __version__
from gdetkd_cli.commands import card, run_distill, run_export, run_train
from gdetkd_cli.commands.train import resume_run
from gdetkd_cli.engine.events import Note
from gdetkd_cli.recipe.schema import Recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled run with an exported file and an image; to be read, not to be changed."""
    folder = tmp_path_factory.mktemp("card") / "run"
    run_distill(toy.recipe(steps=3), output=folder)
    run_export(str(folder), onnx=True, torchscript=False, output=None)
    toy.write_images(folder, ["street.jpg"])
    return folder


def test_the_front_matter_is_the_hubs(run: Path) -> None:
    text, metrics = (run / "README.md").read_text(), json.loads((run / "metrics.json").read_text())
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("gdetkd", "object-detection", "other")
    assert data.tags == ["object-detection", "pytorch", "knowledge-distillation"]
    assert data.datasets == ["gdetkd-built-in-scenes"]
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == {
        "AP at IoU 0.50:0.95": round(metrics["AP"], 2),
        "AP at IoU 0.50": round(metrics["AP50"], 2),
        "AP at IoU 0.75": round(metrics["AP75"], 2),
    }


def test_the_card_states_the_facts_of_the_run(run: Path) -> None:
    text, metrics = (run / "README.md").read_text(), json.loads((run / "metrics.json").read_text())
    for line in (
        "# toy",
        "| training images | 10 |",
        "| validation images | 4 |",
        "| steps | 3 |",
        "| images per step | 2 |",
        "| optimizer | adamw, learning rate 0.001, cosine schedule |",
        "| terms | sgfi (weight 10), ckd (weight 1), class\\_kd (weight 1), box\\_kd (weight 1) |",
        f"| {metrics['AP']:.1f} | {metrics['AP50']:.1f} | {metrics['AP75']:.1f} |",
    ):
        assert line in text
    assert f"9 classes, distilled from resnet18 faster-rcnn. gdetkd {__version__} wrote this page" in text
    assert text.count("to be filled in") == 4  # the use, and three licences
    assert str(run.parent) not in text
    for name, value in metrics["per_class"].items():
        assert f"| {name} | {'-' if value is None else f'{value:.1f}'} |" in text


@pytest.mark.parametrize("which", [0, 1])
def test_the_code_in_the_card_runs_without_gdetkd(which: int, run: Path) -> None:
    code = re.findall(r"```python\n(.*?)\n```", (run / "README.md").read_text(), re.DOTALL)[which].replace("0.5", "0")
    program = f"import sys; sys.modules['gdetkd_cli'] = None\n{code}"
    environment = {"PYTHONPATH": str(run), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=run, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"(disc|square|triangle)-\w+ 0\.\d+ ", done.stdout)


def test_a_run_that_goes_on_writes_it_again(tmp_path: Path) -> None:
    folder = run_train(toy.recipe(steps=2), output=tmp_path / "run").run
    before = (folder / "README.md").read_text()
    assert "| steps | 2 |" in before
    assert "Plain training, without a teacher." in before
    assert "knowledge-distillation" not in before
    resume_run(folder, steps=3)
    after = (folder / "README.md").read_text()
    assert "| steps | 3 |" in after

    own = after.replace("*to be filled in*", "MIT")
    own = own[: own.index("<!-- gdetkd")]
    (folder / "README.md").write_text(own)
    resume_run(folder, steps=4)
    assert (folder / "README.md").read_text() == own


def test_a_card_that_fails_does_not_lose_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise KeyError("wobble")

    monkeypatch.setattr(card, "build_card", fail)
    notes: list[str] = []
    result = run_train(
        toy.recipe(steps=1),
        output=tmp_path / "run",
        observer=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert (result.run / "metrics.json").exists()
    assert not (result.run / "README.md").exists()
    assert any("README.md could not be written: KeyError: 'wobble'" in note for note in notes)


def _make_setup(tmp_path: Path, **fields: Any) -> Any:
    """What a card reads of a run on files with odd names."""
    (tmp_path / "runs" / "big_one").mkdir(parents=True)
    (tmp_path / "runs" / "big_one" / "student.pt").touch()
    recipe = Recipe.model_validate(
        toy.recipe().model_dump(mode="json")
        | {
            "data": {"format": "coco", "root": str(tmp_path / "my [data]")},
            "student": {"arch": "factory", "factory": "my_package.models:make", "weights": str(tmp_path / "start.pt")},
            "teacher": {"arch": "checkpoint", "path": str(tmp_path / "runs" / "big_one" / "student.pt")},
        }
    )
    detector = SimpleNamespace(class_names=("a|b", "`c`\x1b", "<d>"), parameter_count=1_234_000)
    description = {"kind": "factory", "factory": "my_package.models:make"}
    return SimpleNamespace(
        recipe=recipe,
        student=SimpleNamespace(detector=detector, description=description),
        pair=SimpleNamespace(kind="heterogeneous", terms=(), head_transfer="none"),
        image_counts={"train": 12_345, "val": 6},
        labels={"val": {}},
        compute=SimpleNamespace(
            settings=SimpleNamespace(device="cpu", precision="fp32"), accelerator=SimpleNamespace(num_processes=2)
        ),
        **fields,
    )


def test_paths_and_markup_of_the_user_stay_out(tmp_path: Path) -> None:
    scores = dict.fromkeys(("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"), 12.34)
    text = card.build_card({**scores, "images": 6, "per_class": {"a|b": None}}, _make_setup(tmp_path))
    assert str(tmp_path) not in text
    assert "| classes | a\\|b, \\`c\\`\\\\x1b, \\<d\\> |" in text
    assert "| a\\|b | - |" in text
    assert "Knowledge distillation from big\\_one, a heterogeneous pair." in text
    assert "| the data (my \\[data\\]) |" in text
    assert "| the weights that training started from (start.pt) |" in text
    assert "| training images | 12,345 |" in text
    assert "| images per step | 4 |" in text
    assert "The teacher labelled these images" in text
    assert "from my_package.models import make\n" in text
    assert ModelCard(text).data.datasets == ["my-data-"]


def test_a_student_without_detections_has_no_results(tmp_path: Path) -> None:
    text = card.build_card({"AP": None, "per_class": {}, "images": 0}, _make_setup(tmp_path))
    assert "The student was not evaluated" in text
    assert ModelCard(text).data.eval_results is None
