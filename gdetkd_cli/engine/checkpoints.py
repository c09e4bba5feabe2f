"""The resume checkpoints of a run: ``resume/step-N``, each complete or refused.

A checkpoint holds weights and JSON, and no pickle is executed to read it:

    state.pt         weights of the student and the terms, their average if there is one, and the optimizer's state
    rank-R.pt        random numbers and log sums of process R
    progress.json    steps done, and what the run was made of
    manifest.json    size and SHA-256 of the other files
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from gdetkd_cli.errors import RunFolderError, get_first_line
from gdetkd_cli.files import write_file, write_text

_MANIFEST, _PROGRESS, _STATE = "manifest.json", "progress.json", "state.pt"
_NAME = re.compile(r"step-(\d+)")
_WIDTH = 8  # digits, so that names sort by step


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says about the run.

    Attributes:
        step: optimizer steps done.
        processes: number of processes that wrote it.
        origin: what the run was made of, as JSON; see ``assembly.describe_origin``.
    """

    step: int
    processes: int
    origin: dict[str, Any]


class Checkpoint:
    """One complete checkpoint."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress

    def read_state(self) -> dict[str, Any]:
        """Reads the weights and the optimizer's state, on the CPU."""
        return _read(self.path / _STATE)

    def read_rank(self, rank: int) -> dict[str, Any]:
        """Reads one process's random numbers and sums."""
        return _read(self.path / f"rank-{rank}.pt")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``resume/`` of the run.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self._keep = keep
        self._fresh = folder / "unfinished"

    def list_steps(self) -> list[int]:
        """The steps of all checkpoints, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def open_latest(self) -> Checkpoint | None:
        """Checks and opens the newest checkpoint; None if the run has none.

        Raises:
            RunFolderError: it is damaged or was changed.
        """
        steps = self.list_steps()
        if not steps:
            return None
        path = self._name(steps[-1])
        try:
            _check_manifest(path)
            return Checkpoint(path, _read_progress(path / _PROGRESS))
        except RunFolderError as error:
            way = f"delete that folder to continue from step {steps[-2]}" if steps[1:] else "start the run again"
            raise RunFolderError(f"{error}; {way}") from error

    def start(self) -> None:
        """Makes an empty folder for the next checkpoint; called by one process."""
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir(parents=True)

    def write_rank(self, rank: int, content: dict[str, Any]) -> None:
        """Writes one process's part; called by every process after ``start``."""
        write_file(self._fresh / f"rank-{rank}.pt", lambda file: torch.save(content, file))

    def finish(self, state: dict[str, Any], progress: Progress) -> None:
        """Writes the rest, renames the folder and removes old checkpoints; called by one process.

        A kill at any time leaves the older checkpoints, or those and the new one.
        """
        write_file(self._fresh / _STATE, lambda file: torch.save(state, file), size=_count_bytes(state))
        write_text(self._fresh / _PROGRESS, json.dumps(vars(progress)))
        write_text(self._fresh / _MANIFEST, json.dumps(_describe_files(self._fresh), indent=2))
        final = self._name(progress.step)
        shutil.rmtree(final, ignore_errors=True)  # after a restart from an older one
        os.replace(self._fresh, final)
        for step in self.list_steps()[: -self._keep]:
            shutil.rmtree(self._name(step), ignore_errors=True)

    def _name(self, step: int) -> Path:
        return self.folder / f"step-{step:0{_WIDTH}}"


def read_random_state() -> dict[str, Any]:
    """The states of this process's random number generators, as tensors and integers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores what ``read_random_state`` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, UnpicklingError) as error:
        raise RunFolderError(f"{path} cannot be read: {get_first_line(error)}; start the run again") from error
    return content


def _read_progress(file: Path) -> Progress:
    try:
        return Progress(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{file} is not of this version of gdetkd") from error


def _check_manifest(path: Path) -> None:
    """Compares a checkpoint with its manifest: a file may be missing, damaged or added."""
    try:
        expected = json.loads((path / _MANIFEST).read_text())
        actual = _describe_files(path)
        wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RunFolderError(f"{path / _MANIFEST} is missing or damaged") from error
    if wrong:
        raise RunFolderError(f"{path} was changed or damaged since it was written ({', '.join(wrong)})")


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """By name, the size in bytes and the SHA-256 of every file except the manifest."""
    described = {}
    for path in sorted(folder.iterdir()):
        if path.name != _MANIFEST:
            with path.open("rb") as file:
                described[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
    return described


def _count_bytes(value: object) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_count_bytes, items))
