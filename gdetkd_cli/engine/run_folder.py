"""The folder of one run: its files, and how they are written without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from platform import node
from typing import Any

from filelock import FileLock, Timeout

from gdetkd_cli.engine.checkpoints import Checkpoints
from gdetkd_cli.errors import RunFolderError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.files import write_text

_LOCK = ".lock"


class RunFolder:
    """Paths of a run. Layout:

    recipe.yaml        the resolved recipe
    environment.json   versions, seed, device, threads, git revision
    probe.json         both measured pyramids
    labels/            train.json, val.json: the teacher's labels, if it labelled the images
    knowledge/         the teacher's features, with `distill.teacher_cache: disk`
    metrics.jsonl      one line per log step and evaluation
    tensorboard/       the same as events, if the recipe has that tracker
    resume/step-N/     the last checkpoints: student, terms, averaged weights, optimizer, random numbers
    best.pt            the student at its best evaluation, if there were evaluations before the end
    student.pt         the trained student alone
    student/           code that rebuilds it without this package
    pretrained/        a student of transformers, as its ``from_pretrained`` loads it, instead of ``student/``
    metrics.json       the last evaluation, and the step at which the run ended
    detections.npz     the student's detections at the last evaluation
    images/            validation images with predicted boxes
    measured.json      costs of the detectors, and what SGFI and CKD do on some validation images
    teacher.npz        the teacher's detections on these images, or on all
    pyramids/          the levels of both detectors over one image
    report.html        all of it on one page
    README.md          the model card
    bad_images.txt     images that could not be read and were left out, if there are any
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.probe = path / "probe.json"
        self.labels = path / "labels"
        self.knowledge = path / "knowledge"
        self.metrics_log = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.resume = path / "resume"
        self.best = path / "best.pt"
        self.student = path / "student.pt"
        self.student_code = path / "student"
        self.pretrained = path / "pretrained"
        self.metrics = path / "metrics.json"
        self.detections = path / "detections.npz"
        self.images = path / "images"
        self.measured = path / "measured.json"
        self.teacher_detections = path / "teacher.npz"
        self.pyramids = path / "pyramids"
        self.report = path / "report.html"
        self.card = path / "README.md"
        self.bad_images = path / "bad_images.txt"

    def checkpoints(self, keep: int = 1) -> Checkpoints:
        """The run's checkpoints, of which ``keep`` remain."""
        return Checkpoints(self.resume, keep)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder and locks it against other processes until the block or this process ends.

        A folder that is still empty at the end is removed, so that a run that fails to start leaves nothing behind.

        Raises:
            RunFolderError: another process holds it, or the path is a file.
        """
        made = _make_folders(self.path)
        lock = FileLock(self.path / _LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunFolderError(
                f"another process is writing into {self.path}; wait until it ends, or stop it"
            ) from error
        try:
            yield
        finally:
            (self.path / _LOCK).unlink(missing_ok=True)
            lock.release()
            _remove_empty(made)

    def is_held(self) -> bool:
        """Whether a living process on this machine, or one that shares its locks, writes into the folder."""
        path = self.path / _LOCK
        if not path.exists():
            return False
        lock = FileLock(path, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
        return False

    def check_shared(self) -> None:
        """Checks that the run's first process, perhaps on another machine, holds this very folder.

        Raises:
            RunFolderError: the machines do not share the folder.
        """
        if not (self.path / _LOCK).exists():
            raise RunFolderError(
                f"{self.path} on {node()} is not the folder that the run's first process opened; choose an --output on "
                "a file system that all machines share, and start the command in the same folder everywhere"
            )

    def find_labels(self) -> Path | None:
        """Returns the folder of the teacher's labels, if the run has any."""
        files = (self.labels / f"{which}.json" for which in ("train", "val"))
        return self.labels if any(file.is_file() for file in files) else None

    def is_empty(self) -> bool:
        """Whether the folder has no file except its lock."""
        return all(path.name == _LOCK for path in self.path.iterdir())

    def log(self, line: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        with self.metrics_log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut off is left out.

        Raises:
            RunFolderError: a line is damaged.
        """
        if self.metrics_log.exists():
            for number, line in enumerate(self.metrics_log.read_text().splitlines(keepends=True), start=1):
                if line.endswith("\n"):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise RunFolderError(
                            f"{self.metrics_log}: line {number} is damaged ({error}); restore or remove the line"
                        ) from error

    def read_evaluation(self, step: int) -> CocoMetrics | None:
        """The logged evaluation after ``step``; None if there is none."""
        found = (line["evaluation"] for line in self.read_log() if line["step"] == step and "evaluation" in line)
        return next(map(CocoMetrics.from_json, found), None)

    def count_evaluations_since_best(self) -> int:
        """The number of logged evaluations after the one with the highest AP; an equal AP is not higher."""
        found = [line["evaluation"]["AP"] for line in self.read_log() if "evaluation" in line]
        aps = [-1.0 if ap is None else ap for ap in found]  # None: no annotated object
        return len(aps) - 1 - aps.index(max(aps)) if aps else 0

    def drop_log_after(self, step: int, *, evaluation: bool = True) -> None:
        """Removes the lines that a resumed run writes again: those after ``step`` and, on request, its evaluation."""
        if not self.metrics_log.exists():  # a run's log begins with its first step
            return
        kept = [
            line
            for line in self.read_log()
            if line["step"] < step or (line["step"] == step and (evaluation or "evaluation" not in line))
        ]
        write_text(self.metrics_log, "".join(json.dumps(line) + "\n" for line in kept))

    def read_metrics(self) -> dict[str, Any] | None:
        """The last evaluation of a finished run; None if there is none."""
        return read_json(self.metrics) or None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a run folder; empty if there is none.

    Raises:
        RunFolderError: the file is damaged.
    """
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); restore it, or remove it to go on without it") from error


def _make_folders(path: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were missing, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RunFolderError(f"{path} exists already and is a file; choose another --output") from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if not folder.exists() or any(folder.iterdir()):
            return
        folder.rmdir()


@contextmanager
def start_new(path: Path | None, default_name: str) -> Iterator[RunFolder]:
    """Locks the folder of a new run.

    Args:
        path: the user's choice; None: ``runs/NAME``, or ``runs/NAME-2``, ... if that exists.
        default_name: NAME.

    Raises:
        RunFolderError: the user's choice exists and is not an empty folder, or another process writes into it.
    """
    if path is None:
        path, number = Path("runs") / default_name, 2
        while path.exists():
            path, number = Path("runs") / f"{default_name}-{number}", number + 1
    folder = RunFolder(path)
    with folder.lock():
        if not folder.is_empty():
            advice = f", or continue that run with --resume {path}" if folder.recipe.exists() else ""
            raise RunFolderError(f"{path} exists already; choose another --output{advice}")
        yield folder


@contextmanager
def reopen(path: Path) -> Iterator[RunFolder]:
    """Locks the folder of an existing run.

    Raises:
        RunFolderError: it is not a run folder, or another process writes into it.
    """
    folder = open_existing(path)
    with folder.lock():
        yield folder


def open_existing(path: Path) -> RunFolder:
    """Opens an existing run's folder.

    Raises:
        RunFolderError: it is not a run folder.
    """
    folder = RunFolder(path)
    if not path.exists():
        raise RunFolderError(f"there is no run folder {path}; give the folder of a run, such as runs/NAME")
    if not folder.recipe.exists():
        raise RunFolderError(f"{path} is not a run folder, because it has no recipe.yaml")
    return folder
