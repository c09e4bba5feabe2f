"""``gdetkd predict`` as people and programs read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invoke import done, gdetkd
from PIL import Image

MODEL = "builtin:shapes-teacher"


@pytest.fixture(autouse=True)
def _images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 64)).save("a\x1b.png")


def test_tables() -> None:
    shown = done("predict", MODEL, "a\x1b.png", "--save", "drawn", "--csv", "found.csv").stdout
    assert "a\\x1b.png: nothing" in shown
    assert f"images: 1, by {MODEL} (checkpoint), " in shown
    assert "wrote drawn" in shown
    assert "\x1b" not in shown
    assert Path("found.csv").read_text() == "image,class,score,x0,y0,x1,y1\n"


def test_json() -> None:
    found = json.loads(done("predict", MODEL, "*.png", "--min-score", "0", "--json").stdout)
    assert found["schema"] == 1
    assert found["images"][0]["size"] == [64, 96]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pt", "."], "absent.pt does not exist"),
        ([MODEL, "absent"], "absent holds no image and no video"),
        ([MODEL, ".", "--only", "cat"], "has no class 'cat'"),
        ([MODEL, ".", "--min-score", "2"], "less than or equal to 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    shown = gdetkd("predict", *arguments)
    assert shown.exit_code == 2
    assert message in shown.output
