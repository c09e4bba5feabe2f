"""Run folders and files from strangers, and errors at the end: nothing is executed, waited for or lost."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import toy

from gdetkd_cli.commands import resume_run, run_eval, run_probe, run_train
from gdetkd_cli.errors import GDetKDError, ModelError, RunFolderError


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after its checkpoint of step 3."""
    run = tmp_path / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gdetkd_cli.commands.train.evaluate_split", stop)
        with pytest.raises(KeyboardInterrupt):
            run_train(toy.recipe(steps=4, checkpoint_every=3), output=run)
    return run


def newest(run: Path) -> Path:
    """Its newest checkpoint."""
    return max((run / "resume").iterdir())


def forge_manifest(checkpoint: Path) -> None:
    """What someone who changes a file on purpose does as well."""
    files = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    described = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps(described))


@pytest.mark.parametrize("name", ["state.pt", "rank-0.pt", "custom_checkpoint_0.pkl", "progress.json"])
def test_nothing_in_a_checkpoint_is_executed(name: str, stopped: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (newest(stopped) / name).write_bytes(pickle.dumps(Hostile(trace)))
    forge_manifest(newest(stopped))
    with suppress(GDetKDError):
        resume_run(stopped)
    assert not trace.exists()


@pytest.mark.parametrize("harm", ["cut", "removed", "added"])
def test_a_damaged_checkpoint_is_refused(harm: str, stopped: Path) -> None:
    weights = newest(stopped) / "state.pt"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "removed":
        weights.unlink()
    else:
        (newest(stopped) / "more.bin").touch()
    with pytest.raises(RunFolderError, match="was changed or damaged since it was written"):
        resume_run(stopped)


def test_an_unchanged_checkpoint_is_resumed(stopped: Path) -> None:
    assert resume_run(stopped).steps == 4


def test_an_error_in_the_last_evaluation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a corrupt image")

    monkeypatch.setattr("gdetkd_cli.commands.train.evaluate_split", fail)
    with pytest.raises(RuntimeError, match="a corrupt image"):
        run_train(toy.recipe(steps=2), output=tmp_path / "run")
    monkeypatch.undo()
    assert run_eval(str(tmp_path / "run"), data=None).metrics.images == 4


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(ModelError, match="is not a regular file"):
        run_probe(str(tmp_path / "model.pt"))
