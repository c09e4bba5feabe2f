"""The examples in docs/examples run as a user runs them, without gdetkd, and draw the detections."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import toy
from documents import ROOT, blocks
from PIL import Image, ImageChops

from gdetkd_cli.commands import run_export, run_predict
from gdetkd_cli.commands.predict import PredictOptions
from gdetkd_cli.commands.run_files import copy_portable
from gdetkd_cli.detectors import catalog

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
ABSENT = {  # packages that an example must do without
    "onnxruntime_alone": ("torch", "torchvision", "onnx", "gdetkd_cli"),
    "torchvision_alone": ("gdetkd_cli", "onnxruntime"),
    "with_supervision": ("torch", "gdetkd_cli"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of a run folder that the examples read: a trained student, its export, its code, and an image."""
    made: Path = tmp_path_factory.mktemp("run")
    teacher = catalog.locate("builtin:shapes-teacher")
    loaded = catalog.load(teacher)
    catalog.save(made / "student.pt", loaded.detector, loaded.description)
    run_export(str(made), onnx=True, torchscript=False, safetensors=True, output=None)
    copy_portable(made / "student")
    toy.write_images(made, ["street.jpg"])
    Image.open(made / "street.jpg").resize((128, 128)).save(made / "street.jpg", quality=95)
    found = run_predict(str(made), [str(made / "street.jpg")], PredictOptions(min_score=0.5))
    assert found.per_class
    return made


def test_every_example_has_its_test() -> None:
    assert {path.stem for path in EXAMPLES} == ABSENT.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_draws_boxes(example: Path, folder: Path) -> None:
    if example.stem == "with_supervision":
        pytest.importorskip("supervision")
    (folder / "drawn.png").unlink(missing_ok=True)
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in ABSENT[example.stem])  # importing them fails
    program = f"import runpy, sys\n{hidden}runpy.run_path({str(example)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (Image.open(folder / name).convert("RGB") for name in ("street.jpg", "drawn.png"))
    assert after.size == before.size
    assert ImageChops.difference(before, after).getbbox() is not None


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_short_and_in_the_guide(example: Path) -> None:
    code = [
        line for line in example.read_text().splitlines() if line and not line.startswith(("import", "from", '"""'))
    ]
    assert len(code) <= 15
    guide = (ROOT / "docs" / "guides" / "export.md").read_text("utf-8")
    assert f"(../examples/{example.name})" in guide


def test_the_guides_code_rebuilds_a_student_from_safetensors(folder: Path) -> None:
    (code,) = [text for page, text in blocks("python") if page == "docs/guides/export.md" and "safe_open" in text]
    program = f"import sys\nsys.modules['gdetkd_cli'] = None\nsys.path.insert(0, '.')\n{code}\nprint(len(names))"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "9\n"), done.stderr


def test_the_guide_shows_the_first_example() -> None:
    shown = [text for page, text in blocks("python") if page == "docs/guides/export.md"]
    assert EXAMPLES[0].read_text() in shown
