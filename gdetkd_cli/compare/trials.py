"""The trials of a comparison: one run per method, budget, seed and, in a cross-validation, fold.

Each trial trains in its own process, so that its memory can be measured and its failure stops no other trial.
Finished trials are skipped, and interrupted ones resume.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from threading import Lock
from time import perf_counter
from typing import Any, Protocol

import torch

from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Note, Observer, Phase, TrialDone
from gdetkd_cli.engine.run_folder import RunFolder, read_json
from gdetkd_cli.engine.signals import StopSignals
from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.evaluation.stored import read_detections
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.schema import Fold, Recipe
from gdetkd_cli.structures import Detections
from gdetkd_cli.trust import is_code_trusted

_FOLD = r"-fold-(\d+)-of-(\d+)"
_TRIAL = re.compile(rf"(.+)-(\d+)-(\d+)(?:{_FOLD})?")


@dataclass(frozen=True)
class Trial:
    """One trial and its folder; ``fold`` is None without folds.

    Attributes:
        measured: whether the run is measured for the comparison's report, which shows one trial of a method.
    """

    method: str
    steps: int
    seed: int
    folder: Path
    fold: Fold | None = None
    measured: bool = field(default=False, compare=False)

    @property
    def title(self) -> str:
        part = f", fold {self.fold.number} of {self.fold.of}" if self.fold else ""
        return f"{self.method}, {self.steps} steps, seed {self.seed}{part}"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    @property
    def finished(self) -> bool:
        return self.run.metrics.exists() and self.run.detections.exists()

    def read_detections(self, class_names: Sequence[str]) -> dict[int, Detections]:
        """Reads a finished trial's detections on the validation images, by image id, with labels of these classes."""
        return read_detections(self.run.detections).relabel(class_names)


class TimeLeft:
    """Estimates the time of the remaining trials from the finished ones. Thread-safe."""

    def __init__(self, trials: Iterable[Trial], jobs: int) -> None:
        self._left = set(trials)
        self._jobs = jobs
        self._per_step: dict[str, list[float]] = defaultdict(list)  # seconds, by method
        self._lock = Lock()

    def remove(self, trial: Trial, seconds: float | None = None) -> tuple[int, float | None]:
        """Removes a trial; returns the number of remaining trials and their estimated seconds, None if unknown.

        Args:
            trial: the trial to remove; it may be removed already.
            seconds: duration of the trial; None if it failed, or if an earlier call ran a part of it.
        """
        with self._lock:
            self._left.discard(trial)
            if seconds is not None:
                self._per_step[trial.method].append(seconds / trial.steps)
            own = {method: mean(rates) for method, rates in self._per_step.items()}
            if not own:
                return len(self._left), None
            usual = mean(own.values())
            work = sum(other.steps * own.get(other.method, usual) for other in self._left)
            return len(self._left), work / min(self._jobs, max(1, len(self._left)))


def build_trial(
    folder: Path, method: str, steps: int, seed: int, fold: Fold | None = None, *, measured: bool = False
) -> Trial:
    """Builds a trial of the table in ``folder``."""
    return Trial(method, steps, seed, folder / f"{method}-{steps}-{seed}{_format_fold(fold)}", fold, measured)


def build_teacher_trial(folder: Path, steps: int, seed: int, fold: Fold) -> Trial:
    """Builds the trial of a fold's own teacher, which is not part of the table."""
    return Trial("teacher", steps, seed, folder / f"teacher{_format_fold(fold)}", fold)


def find_finished_trials(folder: Path, folds: int | None = None) -> dict[Trial, Mapping[str, Any]]:
    """Finds all finished trials and their metrics, sorted by budget, seed, method and fold.

    Args:
        folds: number of folds of the trials; None: trials without folds.
    """
    trials = []
    for own in folder.glob("*/"):
        if name := _TRIAL.fullmatch(own.name):
            method, steps, seed, number, of = name.groups()
            fold = Fold(number=int(number), of=int(of)) if of else None
            trials.append(build_trial(folder, method, int(steps), int(seed), fold))
    trials = [trial for trial in trials if trial.finished and (trial.fold and trial.fold.of) == folds]
    trials.sort(key=lambda trial: (trial.steps, trial.seed, trial.method, trial.fold.number if trial.fold else 0))
    return {trial: read_json(trial.run.metrics) for trial in trials}


def find_fold_counts(folder: Path) -> set[int | None]:
    """Finds the fold counts of the folder's trials and teachers, finished or not; None stands for no folds."""
    names = (written.parent.name for written in folder.glob("*/recipe.yaml"))
    return {int(match[2]) if (match := re.search(f"{_FOLD}$", name)) else None for name in names}


def _format_fold(fold: Fold | None) -> str:
    return f"-fold-{fold.number}-of-{fold.of}" if fold else ""


def run_trials(
    recipes: Mapping[Trial, Recipe],
    settings: ComputeSettings,
    *,
    jobs: int,
    observer: Observer,
    cluster: Cluster | None = None,
    what: str = "trials",
) -> list[str]:
    """Runs the trials that are not finished, ``jobs`` at a time, on separate GPUs if there are enough.

    Args:
        jobs, observer: as in ``run_compare``.
        cluster: runs the trials instead of this machine.
        what: what the trials are, for a note.

    Returns:
        Titles and errors of the failed trials.
    """
    if not recipes:
        return []
    missing = [trial for trial in recipes if not trial.finished]
    observer(Note(f"{len(recipes)} {what}, {len(recipes) - len(missing)} of them already finished"))
    failures, children = [], Children()
    free: SimpleQueue[Mapping[str, str]] = SimpleQueue()
    for environment in list_environments(settings, jobs):
        free.put(environment)
    time_left = TimeLeft(missing, jobs)

    def work(trial: Trial) -> None:
        observer(Phase(trial.title))
        environment = free.get()
        whole, start = not trial.run.path.exists(), perf_counter()
        try:
            if cluster:
                cluster.run(trial, recipes[trial])
            else:
                train_trial(trial, recipes[trial], environment, children)
        finally:
            time_left.remove(trial)  # failed trials, too
            free.put(environment)
        left, seconds = time_left.remove(trial, perf_counter() - start if whole else None)
        observer(TrialDone(trial.title, read_json(trial.run.metrics)["AP"], left, seconds))

    with StopSignals().installed(), ThreadPoolExecutor(max_workers=jobs) as pool:
        for trial, done in [(trial, pool.submit(work, trial)) for trial in missing]:
            try:
                done.result()
            except (GDetKDError, OSError, RuntimeError) as error:  # RuntimeError: for example torch is out of memory
                failures.append(f"{trial.title}: {error}")
                observer(Note(failures[-1]))
            except KeyboardInterrupt as interrupt:
                pool.shutdown(wait=False, cancel_futures=True)  # else the other trials would still run
                (cluster or children).stop()
                interrupt.add_note("run the same command again to continue")
                raise
    return failures


def list_environments(settings: ComputeSettings, jobs: int) -> list[dict[str, str]]:
    """Lists variables that give each of the ``jobs`` one GPU; they share GPUs if there are fewer."""
    if settings.device != "cuda":
        return [{}] * jobs
    count = torch.cuda.device_count()
    # This process's device 0 may be the machine's device 3, so pass on the names from its own environment.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = visible.split(",")[:count]
    return [{"CUDA_VISIBLE_DEVICES": names[i % count]} for i in range(jobs)]


class Cluster(Protocol):
    """Runs trials elsewhere. Thread-safe."""

    def run(self, trial: Trial, recipe: Recipe) -> None:
        """Runs one trial to its end; raises a GDetKDError if it failed."""

    def stop(self) -> None:
        """Ends the running trials, and starts no others."""


class Children:
    """The running processes of trials. Thread-safe."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = Lock()

    def run(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        """Runs a process to its end and returns its exit code; its errors go into ``log``."""
        with log.open("a") as stderr:
            with self._lock:
                if self._stopped:
                    return -signal.SIGTERM
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
                self._running.add(process)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Lets every process write a checkpoint and end, and starts no others."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def train_trial(
    trial: Trial, recipe: Recipe, environment: Mapping[str, str] | None = None, children: Children | None = None
) -> None:
    """Trains and evaluates the trial's student in its own process, unless it is already trained.

    Args:
        environment: variables to add to this process's own.

    Raises:
        GDetKDError: the process failed, or a process of an earlier call is still training.
    """
    run = trial.run
    if trial.finished:
        return
    trial.folder.mkdir(parents=True, exist_ok=True)
    path = trial.folder / "recipe.yaml"
    write_text(path, dump_recipe(recipe))
    command = [sys.executable, "-m", "gdetkd_cli", "distill" if recipe.distill else "train", "--json"]
    command += ["--recipe", str(path), "--output", str(run.path), "--resume", "auto"]
    if recipe.distill:
        command.append("--no-report")  # the comparison has its own
    if not trial.measured:
        command.append("--no-measure")
    if is_code_trusted():
        command.append("--trust-code")
    log = trial.folder / "log.txt"
    code = (children or Children()).run(command, log, {**os.environ, **(environment or {})})
    if code < 0:
        name = signal.Signals(-code).name
        reason = ", often for lack of memory" if name == "SIGKILL" else ""
        raise GDetKDError(f"{name} ended its process{reason}; run the same command again to continue ({log})")
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise GDetKDError(f"{lines[-1] if lines else f'exit code {code}'} ({log})")
    if not trial.finished:
        raise GDetKDError(f"{run.path} has no metrics or no detections; remove it and run the same command again")
