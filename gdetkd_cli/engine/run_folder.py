"""The folder of one run: what is where, and how it is written without losing anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gdetkd_cli.errors import RunFolderError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there a folder is not guarded
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """Paths of a run. Layout:

    recipe.yaml        the resolved recipe
    environment.json   versions, seed, device, threads, git revision
    probe.json         both pyramids as they were measured
    labels/            train.json, val.json: what the teacher labelled, where it did
    metrics.jsonl      one line per log step and evaluation
    tensorboard/       the same as events
    resume/            the last checkpoint: student, terms, optimizer, random numbers
    student.pt         the trained detector alone
    student/           code that rebuilds it without this package
    metrics.json       the last evaluation
    images/          validation images with predicted boxes
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.probe = path / "probe.json"
        self.labels = path / "labels"
        self.metrics_log = path / "metrics.jsonl"
        self.resume = path / "resume"
        self.student = path / "student.pt"
        self.student_code = path / "student"
        self.metrics = path / "metrics.json"
        self.images = path / "images"

    def make(self) -> None:
        """Makes the folder where it is missing."""
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a second process from writing into the folder, until the block or this process ends.

        Raises:
            RunFolderError: another process holds it.
        """
        self.make()
        lock = self.path / ".lock"
        with lock.open("w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise RunFolderError(
                        f"another process is writing into {self.path}; wait until it has ended, or stop it"
                    ) from error
            yield
        lock.unlink(missing_ok=True)

    def progress(self) -> int:
        """Optimizer steps that the resume checkpoint has behind it.

        Raises:
            RunFolderError: there is no checkpoint.
        """
        file = self.resume / "progress.json"
        if not file.exists():
            raise RunFolderError(
                f"{self.path} has no resume checkpoint; expected the folder of a run that was stopped after its first "
                "checkpoint (see train.checkpoint_every)"
            )
        return int(json.loads(file.read_text())["step"])

    def log(self, line: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        with self.metrics_log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        if self.metrics_log.exists():
            for line in self.metrics_log.read_text().splitlines():
                yield json.loads(line)

    def drop_log_after(self, step: int) -> None:
        """Forgets lines later than ``step``: a resumed run writes them again."""
        kept = [line for line in self.read_log() if line["step"] <= step]
        write_text(self.metrics_log, "".join(json.dumps(line) + "\n" for line in kept))

    def replace_resume(self, fresh: Path) -> None:
        """Makes a folder, written whole, the resume checkpoint. A kill at any moment leaves the old or the new one."""
        old = self.path / "resume.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.resume.exists():
            os.replace(self.resume, old)
        os.replace(fresh, self.resume)
        shutil.rmtree(old, ignore_errors=True)

    def recover_resume(self) -> None:
        """Undoes a replacement that was killed half-way."""
        old = self.path / "resume.old"
        if old.exists() and not self.resume.exists():
            os.replace(old, self.resume)


def choose(path: Path | None, default_name: str) -> RunFolder:
    """A new run's folder; it is not made yet, so that a run that cannot start leaves nothing behind.

    Args:
        path: where the user wants it; None: ``runs/NAME``, or ``runs/NAME-2``, ... when that exists.
        default_name: NAME.

    Raises:
        RunFolderError: the folder the user named exists and is not empty.
    """
    if path is None:
        path, number = Path("runs") / default_name, 2
        while path.exists():
            path, number = Path("runs") / f"{default_name}-{number}", number + 1
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(
            f"{path} exists already; choose another --output, or continue that run with --resume {path}"
        )
    return RunFolder(path)


def open_existing(path: Path) -> RunFolder:
    """An existing run's folder.

    Raises:
        RunFolderError: it is not one.
    """
    folder = RunFolder(path)
    if not folder.recipe.exists():
        raise RunFolderError(f"{path} is not a run folder: it has no recipe.yaml")
    folder.recover_resume()
    return folder


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)
