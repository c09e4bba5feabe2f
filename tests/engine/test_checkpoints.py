"""Checkpoints are complete or refused, and nothing in them is executed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gdetkd_cli.engine.checkpoints import Checkpoints, Progress, read_random_state, restore_random_state
from gdetkd_cli.errors import RunFolderError


def write(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.start()
        checkpoints.write_rank(0, {"step": step})
        checkpoints.finish({"weight": torch.full((2,), float(step))}, Progress(step, 1, {"recipe": {"name": "x"}}))


def test_the_newest_are_kept_and_the_newest_is_opened(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "resume", keep=2)
    assert checkpoints.open_latest() is None
    write(checkpoints, 9, 10, 100)
    assert checkpoints.list_steps() == [10, 100]
    latest = checkpoints.open_latest()
    assert latest is not None
    assert latest.progress == Progress(100, 1, {"recipe": {"name": "x"}})
    assert latest.read_rank(0) == {"step": 100}
    assert latest.read_state()["weight"].tolist() == [100.0, 100.0]


def test_an_unfinished_checkpoint_is_ignored_and_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 3)
    checkpoints.start()
    checkpoints.write_rank(0, {})  # killed here
    assert checkpoints.list_steps() == [3]
    write(checkpoints, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("name", ["state.pt", "rank-0.pt", "progress.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "removed"])
def test_a_damaged_checkpoint_is_refused_and_an_older_one_offered(name: str, harm: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 3, 6)
    file = tmp_path / "step-00000006" / name
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(RunFolderError, match=r"step-00000006.*; delete that folder to continue from step 3"):
        checkpoints.open_latest()


def test_a_file_that_was_added_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 3)
    (tmp_path / "step-00000003" / "more.bin").touch()
    with pytest.raises(RunFolderError, match=r"changed or damaged.*more.bin\); start the run again"):
        checkpoints.open_latest()


def test_random_numbers_continue() -> None:
    state = read_random_state()
    first = torch.rand(3), random.random(), np.random.rand()
    restore_random_state(state)
    again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
