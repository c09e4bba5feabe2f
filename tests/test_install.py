"""The wheel: what it contains, and whether it works outside the checkout. The notebook runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from gdetkd_cli.commands import demo

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    return folder / run(sys.executable, "-c", build, folder, cwd=ROOT).splitlines()[-1]


def test_the_wheel_holds_what_the_program_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "gdetkd_cli").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"gdetkd_cli/builtin_recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in names)


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """An environment with this one's packages, but for gdetkd, which comes from the wheel."""
    venv.create(tmp_path / "own", symlinks=True)
    (site,) = (tmp_path / "own").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (packages,) = {path for path in sys.path if path.endswith("site-packages") and (Path(path) / "torch").is_dir()}
    (site / "packages.pth").write_text(packages)
    python = tmp_path / "own" / "bin" / "python"
    where = run(python, "-c", "import gdetkd_cli; print(gdetkd_cli.__file__)", cwd=tmp_path)
    assert where.startswith(str(site))
    assert "shapes/frcnn-frcnn" in run(python, "-m", "gdetkd_cli", "recipe", "list", cwd=tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    found = run(python, "-m", "gdetkd_cli", "predict", "builtin:shapes-teacher", "a.png", "--json", cwd=tmp_path)
    assert json.loads(found)["images"][0]["size"] == [64, 64]


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "docs" / "notebooks" / "demo.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    read, small = demo.load_recipe, ("data.train_images=60", "data.val_images=20")
    monkeypatch.setattr(demo, "load_recipe", lambda name, overrides: read(name, [*overrides, *small]))
    names: dict[str, object] = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("STEPS = 500", "STEPS = 2"), names)  # noqa: S102 - our own cells
    assert names["STEPS"] == 2
    assert "found" in names
