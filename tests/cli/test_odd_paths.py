"""Pipes, devices, URLs and archives in place of files and folders are refused at once, with advice."""

from __future__ import annotations

import json
import os
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoke import gdetkd
from PIL import Image

PIPE = "(a pipe, a socket or a device: copy its content to a file first)"
ARCHIVE = "(an archive: unpack it first)"
URL = "(a URL: download it first)"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Interrupts a read that waits for a pipe."""

    def interrupt(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A COCO folder with one image per split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    tables = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    }
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(tables))
    write_recipe(tmp_path / "mine.yaml", root=".")
    return tmp_path


def write_recipe(path: Path, *, root: str) -> None:
    path.write_text(
        f"name: x\ndata: {{format: coco, root: {root}}}\ntrain: {{steps: 1}}\n"
        "student: {arch: composed, backbone: resnet18, head: fcos}\n"
    )


def refuse(*arguments: str) -> str:
    shown = gdetkd(*arguments)
    assert (shown.exit_code, shown.stdout) == (2, ""), shown.stderr
    return shown.stderr


@pytest.mark.parametrize("name", ["val.json", "images/a.png", "images"])
def test_a_pipe_among_the_data(data: Path, name: str) -> None:
    path = data / name
    path.rename(data / "kept")
    os.mkfifo(path)
    assert PIPE in refuse("eval", "builtin:shapes-teacher", "--data", "mine.yaml")


def test_a_pipe_as_model_recipe_image_and_folder(data: Path) -> None:
    os.mkfifo(data / "pipe")
    assert PIPE in refuse("probe", "pipe")
    assert PIPE in refuse("train", "--recipe", "pipe")
    assert PIPE in refuse("eval", "builtin:shapes-teacher", "--data", "pipe")
    assert PIPE in refuse("init", "--teacher", "builtin:shapes-teacher", "--student", "resnet18+fcos", "--data", "pipe")
    assert PIPE in refuse("probe", "builtin:shapes-teacher", "--image", "pipe")
    assert PIPE in refuse("probe", "/dev/zero")


def test_a_pipe_beside_the_annotations_is_passed_over(data: Path) -> None:
    os.mkfifo(data / "other.json")
    (data / "val.json").rename(data / "valid.json")
    assert "has the classes cell" in refuse("eval", "builtin:shapes-teacher", "--data", ".")


def test_urls(data: Path) -> None:
    url = "https://example.org/teacher.pt"
    for arguments in (("probe", url), ("eval", url), ("train", "--recipe", url), ("eval", "builtin:x", "--data", url)):
        assert URL in refuse(*arguments)
    tables = json.loads((data / "val.json").read_text())
    tables["images"][0]["file_name"] = "http://example.org/a.png"
    (data / "val.json").write_text(json.dumps(tables))
    assert URL in refuse("eval", "builtin:shapes-teacher", "--data", ".")


def test_archives(data: Path) -> None:
    with zipfile.ZipFile(data / "all.zip", "w") as archive:
        archive.write("val.json")
    assert ARCHIVE in refuse("probe", "all.zip")
    assert ARCHIVE in refuse("eval", "builtin:shapes-teacher", "--data", "all.zip")
    write_recipe(data / "mine.yaml", root="all.zip")
    assert ARCHIVE in refuse("train", "--recipe", "mine.yaml")
