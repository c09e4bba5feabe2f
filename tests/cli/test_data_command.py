"""``gdetkd data`` as people and programs read it."""

from __future__ import annotations

import json
from pathlib import Path

import invoke
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A YOLO folder with 25 faulty rows, in a class and a file whose names hide something."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "mine"
    for which in ("train", "val"):
        for part in ("images", "labels"):
            (root / part / which).mkdir(parents=True)
        Image.new("RGB", (20, 10), (0, 0, 200 * (which == "val"))).save(root / "images" / which / "a\x1b.png")
        (root / "labels" / which / "a\x1b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "labels/train/a\x1b.txt").write_text("0 0.5 0.5 0.5 0.5\n" + "9 0.5 0.5 0.5 0.5\n" * 25)
    (root / "data.yaml").write_text('train: images/train\nval: images/val\nnames: ["cat\\u202e"]\n')
    return root


def test_tables(folder: Path) -> None:
    output = invoke.done("data", "mine").output
    assert "mine: data: {format: yolo, root: mine}" in output
    assert "cat\\u202e" in output
    assert "mine/labels/train/a\\x1b.txt:2: row dropped: the class number has no name" in output
    assert "... and 5 more problems; --json lists all" in output
    assert "25 problems" in output
    assert "wrote data.png" in output
    assert "\x1b" not in output


def test_json(folder: Path) -> None:
    report = json.loads(invoke.done("data", "mine", "--sheet", "sheet.png", "--json").stdout)
    assert report["format"] == "yolo"
    assert [split["images"] for split in report["splits"]] == [1, 1]
    assert len(report["problems"]) == 25
    assert report["sheet"] == "sheet.png"
    assert Path("sheet.png").is_file()


def test_a_recipe_and_mistakes(folder: Path) -> None:
    Path("my.yaml").write_text(invoke.done("recipe", "show", "shapes/frcnn-frcnn").stdout)
    assert "data: {format: synthetic" in invoke.done("data", "my.yaml", "--sheet", "scenes.png").output
    result = invoke.gdetkd("data", "absent")
    assert result.exit_code == 2
    assert "no recipe file or built-in recipe is named absent" in result.output
    result = invoke.gdetkd("data", "mine", "--sheet", "scenes.png")
    assert result.exit_code == 2
    assert "scenes.png already exists; choose another file with --sheet" in result.output
