"""Run folders are never overwritten, never shared, and resumed without repeated lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gdetkd_cli.engine.run_folder import RunFolder, reopen, start_new
from gdetkd_cli.errors import RunFolderError


def test_the_default_folder_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):
        with start_new(None, "x") as folder:
            folder.recipe.touch()
        found.append(folder.path.as_posix())
    assert found == ["runs/x", "runs/x-2", "runs/x-3"]


def test_an_empty_folder_is_used_and_a_filled_one_refused(tmp_path: Path) -> None:
    with start_new(tmp_path, "x") as folder:
        assert folder.path == tmp_path
    for file, advice in (("a", "choose another --output$"), ("recipe.yaml", "or continue that run with --resume")):
        (tmp_path / file).touch()
        with pytest.raises(RunFolderError, match=advice), start_new(tmp_path, "x"):
            pass


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a" / "run"):
        with pytest.raises(RunFolderError, match="is a file"), start_new(path, "x"):
            pass


def test_a_run_that_fails_to_start_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start_new(tmp_path / "runs" / "new", "x"):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    (tmp_path / "own").mkdir()
    with start_new(tmp_path / "own", "x"):
        pass
    assert (tmp_path / "own").exists()  # it was there before


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        start_new(tmp_path / "run", "x") as folder,
        pytest.raises(RunFolderError, match="another process is writing into"),
        start_new(tmp_path / "run", "x"),
    ):
        pass
    with folder.lock():
        folder.recipe.touch()
        with pytest.raises(RunFolderError, match="another process"), reopen(folder.path):
            pass
    with reopen(folder.path):
        pass
    assert [path.name for path in folder.path.iterdir()] == ["recipe.yaml"]


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step, "loss": 0.5})
        folder.log({"step": step, "evaluation": {}})
    folder.drop_log_after(2)
    assert [line["step"] for line in folder.read_log()] == [1, 1, 2, 2]
    folder.drop_log_after(2, evaluation=False)
    assert [line["step"] for line in folder.read_log()] == [1, 1, 2]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "loss": 0.5})
    with folder.metrics_log.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in folder.read_log()] == [1]
    folder.drop_log_after(5)
    folder.log({"step": 2, "loss": 0.25})
    assert [line["step"] for line in folder.read_log()] == [1, 2]


def test_a_damaged_line_of_the_log_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics_log.write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 2 is damaged \(.*; restore or remove the line"):
        list(folder.read_log())
