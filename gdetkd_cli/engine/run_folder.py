"""The folder of one run: its files, and how they are written without loss."""

from __future__ import annotations

import hashlib
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
except ImportError:  # Windows has no such locks, so folders are not locked there
    fcntl = None  # type: ignore[assignment]


MANIFEST = "manifest.json"  # of a resume checkpoint


class RunFolder:
    """Paths of a run. Layout:

    recipe.yaml        the resolved recipe
    environment.json   versions, seed, device, threads, git revision
    probe.json         both measured pyramids
    labels/            train.json, val.json: the teacher's labels, if it labelled the images
    metrics.jsonl      one line per log step and evaluation
    tensorboard/       the same as events
    resume/            the last checkpoint: student, terms, optimizer, random numbers
    student.pt         the trained detector alone
    student/           code that rebuilds it without this package
    metrics.json       the last evaluation
    images/            validation images with predicted boxes
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
        """Makes the folder if it is missing."""
        self.path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the folder against other processes until the block or this process ends.

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
                        f"another process is writing into {self.path}; wait until it ends, or stop it"
                    ) from error
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def progress(self) -> tuple[int, dict[str, Any]]:
        """The optimizer steps done at the resume checkpoint, and the state of its schedule.

        Raises:
            RunFolderError: there is no checkpoint, or it has another format.
        """
        file = self.resume / "progress.json"
        if not file.exists():
            raise RunFolderError(
                f"{self.path} has no resume checkpoint; expected the folder of a run that stopped after its first "
                "checkpoint (see train.checkpoint_every)"
            )
        try:
            progress = json.loads(file.read_text())
            return int(progress["step"]), dict(progress["schedule"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{file} is not a checkpoint of this version of gdetkd; start the run again"
            ) from error

    def check_resume(self) -> None:
        """Compares the resume checkpoint with its manifest.

        Raises:
            RunFolderError: a file is missing, damaged or was added.
        """
        manifest = self.resume / MANIFEST
        if not manifest.exists():
            raise RunFolderError(f"{self.resume} has no {MANIFEST}, so it cannot be checked; start the run again")
        try:
            expected = json.loads(manifest.read_text())
        except ValueError as error:
            raise RunFolderError(f"{manifest} is damaged; start the run again") from error
        actual = _describe_files(self.resume)
        wrong = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
        if wrong:
            raise RunFolderError(
                f"{self.resume} was changed or damaged since it was written ({', '.join(wrong)}); start the run again"
            )

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
        """Removes lines later than ``step``, which a resumed run writes again."""
        kept = [line for line in self.read_log() if line["step"] <= step]
        write_text(self.metrics_log, "".join(json.dumps(line) + "\n" for line in kept))

    def replace_resume(self, fresh: Path) -> None:
        """Makes a complete folder the resume checkpoint. A kill at any time leaves the old or the new one."""
        write_text(fresh / MANIFEST, json.dumps(_describe_files(fresh), indent=2))
        old = self.path / "resume.old"
        shutil.rmtree(old, ignore_errors=True)
        if self.resume.exists():
            os.replace(self.resume, old)
        os.replace(fresh, self.resume)
        shutil.rmtree(old, ignore_errors=True)

    def recover_resume(self) -> None:
        """Undoes a replacement that was interrupted."""
        old = self.path / "resume.old"
        if old.exists() and not self.resume.exists():
            os.replace(old, self.resume)


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """By name, the size in bytes and the SHA-256 of every file of a checkpoint except its manifest."""
    described = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            with path.open("rb") as file:
                described[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
    return described


def choose(path: Path | None, default_name: str) -> RunFolder:
    """Chooses a new run's folder but does not make it, so that a run that fails to start leaves nothing behind.

    Args:
        path: the user's choice; None: ``runs/NAME``, or ``runs/NAME-2``, ... if that exists.
        default_name: NAME.

    Raises:
        RunFolderError: the user's choice exists and is not an empty folder.
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
    """Opens an existing run's folder.

    Raises:
        RunFolderError: it is not a run folder.
    """
    folder = RunFolder(path)
    if not folder.recipe.exists():
        raise RunFolderError(f"{path} is not a run folder, because it has no recipe.yaml")
    folder.recover_resume()
    return folder


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    os.replace(fresh, path)
