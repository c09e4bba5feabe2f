"""Run folders are never overwritten, replaced as a whole, and resumed without repeated lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdetkd_cli.engine.run_folder import RunFolder, choose, open_existing
from gdetkd_cli.errors import RunFolderError


def test_the_default_folder_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):
        folder = choose(None, "x")
        folder.make()
        found.append(folder.path.as_posix())
    assert found == ["runs/x", "runs/x-2", "runs/x-3"]


def test_an_empty_folder_is_taken_and_a_used_one_refused(tmp_path: Path) -> None:
    assert choose(tmp_path, "x").path == tmp_path
    (tmp_path / "a").touch()
    with pytest.raises(RunFolderError, match="choose another --output, or continue that run with --resume"):
        choose(tmp_path, "x")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(RunFolderError, match="exists already"):
        choose(tmp_path / "a", "x")


def checkpoint(path: Path, step: int) -> Path:
    path.mkdir()
    (path / "progress.json").write_text(json.dumps({"step": step, "schedule": {}}))
    return path


def test_replacing_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (3, 6):
        folder.replace_resume(checkpoint(tmp_path / "resume.new", step))
        assert folder.progress() == (step, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resume"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x")
    checkpoint(tmp_path / "resume.old", 3)  # the old one was moved away, the new one is not in place yet
    checkpoint(tmp_path / "resume.new", 6)
    assert open_existing(tmp_path).progress() == (3, {})


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 0.5})
    folder.drop_log_after(2)
    assert [line["step"] for line in folder.read_log()] == [1, 2]
