"""The trials of a comparison: one run each, of a method, a budget and a seed, and of a fold where there are folds.

Each is trained by a process of its own, so that its memory can be told and its failure stops no other; a trial that is
finished is never run again, one that was killed goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from threading import Lock
from time import perf_counter
from typing import Any

import torch

from gdetkd_cli import assembly
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Note, Observer, Phase, TrialDone
from gdetkd_cli.engine.run_folder import RunFolder, write_text
from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.evaluation.predict import predict_split
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.schema import Fold, Recipe
from gdetkd_cli.structures import Detections
from gdetkd_cli.trust import code_is_trusted

_FOLD = r"-fold-(\d+)-of-(\d+)"
_CELL = re.compile(rf"(.+)-(\d+)-(\d+)(?:{_FOLD})?")


@dataclass(frozen=True)
class Trial:
    """One run of a table, in a folder of its own; ``fold`` is None without folds."""

    method: str
    steps: int
    seed: int
    folder: Path
    fold: Fold | None = None

    @property
    def title(self) -> str:
        part = f", fold {self.fold.number} of {self.fold.of}" if self.fold else ""
        return f"{self.method}, {self.steps} steps, seed {self.seed}{part}"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    @property
    def detections(self) -> Path:
        """What the student detects in the validation images; written last, so a trial with it is finished."""
        return self.folder / "detections.pt"

    def read_detections(self) -> dict[int, Detections]:
        """What the student of a finished trial detects, by image id."""
        stored = torch.load(self.detections, weights_only=True)
        return {number: Detections(**one) for number, one in stored.items()}


@dataclass(frozen=True)
class Place:
    """Where a trial is computed.

    Attributes:
        device: of this process: ``cpu`` or ``cuda:1``.
        environment: what the trial's own process needs to be told, whose only CUDA device it then is.
    """

    device: str
    environment: Mapping[str, str] = field(default_factory=dict)


class TimeLeft:
    """How long the trials that are not finished will take, by those that are; of threads that work side by side."""

    def __init__(self, trials: Iterable[Trial], jobs: int) -> None:
        self._left = set(trials)
        self._jobs = jobs
        self._per_step: dict[str, list[float]] = defaultdict(list)  # seconds, by method
        self._lock = Lock()

    def without(self, trial: Trial, seconds: float | None = None) -> tuple[int, float | None]:
        """How many trials are left without this one, and their seconds; None while nothing tells them.

        Args:
            seconds: that this one took; None: not all of it was run now.
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


def trial_of(folder: Path, method: str, steps: int, seed: int, fold: Fold | None = None) -> Trial:
    """A trial of the table in ``folder``."""
    return Trial(method, steps, seed, folder / f"{method}-{steps}-{seed}{_suffix(fold)}", fold)


def teacher_trial_of(folder: Path, steps: int, seed: int, fold: Fold) -> Trial:
    """The training of a fold's own teacher, which is no trial of the table."""
    return Trial("teacher", steps, seed, folder / f"teacher{_suffix(fold)}", fold)


def finished_trials(folder: Path, folds: int | None = None) -> dict[Trial, Mapping[str, Any]]:
    """Every finished trial of the folder, whoever asked for it, and its metrics; by budget, seed, method and fold.

    Args:
        folder: of the table.
        folds: trials of so many folds alone; None: those without folds.
    """
    found = []
    for written in folder.glob("*/detections.pt"):
        if name := _CELL.fullmatch(written.parent.name):
            method, steps, seed, number, of = name.groups()
            fold = Fold(number=int(number), of=int(of)) if of else None
            found.append(trial_of(folder, method, int(steps), int(seed), fold))
    found = [trial for trial in found if (trial.fold and trial.fold.of) == folds]
    found.sort(key=lambda trial: (trial.steps, trial.seed, trial.method, trial.fold.number if trial.fold else 0))
    return {trial: json.loads(trial.run.metrics.read_text()) for trial in found}


def folds_in(folder: Path) -> set[int | None]:
    """Of how many folds the folder's trials and teachers are, begun ones included; None stands for those without."""
    names = (written.parent.name for written in folder.glob("*/recipe.yaml"))
    return {int(found[2]) if (found := re.search(f"{_FOLD}$", name)) else None for name in names}


def _suffix(fold: Fold | None) -> str:
    return f"-fold-{fold.number}-of-{fold.of}" if fold else ""


def run_trials(
    recipes: Mapping[Trial, Recipe], settings: ComputeSettings, *, jobs: int, observer: Observer, what: str = "trials"
) -> list[str]:
    """Runs the trials that are not finished, ``jobs`` at a time, each on a GPU of its own where there are as many; says
    which failed, and why. ``what`` is what they are called."""
    missing = [trial for trial in recipes if not trial.detections.exists()]
    observer(Note(f"{len(recipes)} {what}, {len(recipes) - len(missing)} of them finished before"))
    failures = []
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places(settings, jobs):
        free.put(place)
    time_left = TimeLeft(missing, jobs)

    def work(trial: Trial) -> None:
        observer(Phase(trial.title))
        place = free.get()
        whole, start = not trial.run.path.exists(), perf_counter()
        try:
            train_trial(trial, recipes[trial], place)
            _predict(trial, recipes[trial], settings, place)
        finally:
            time_left.without(trial)  # a failed one too
            free.put(place)
        left, seconds = time_left.without(trial, perf_counter() - start if whole else None)
        observer(TrialDone(trial.title, json.loads(trial.run.metrics.read_text())["AP"], left, seconds))

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for trial, done in [(trial, pool.submit(work, trial)) for trial in missing]:
            try:
                done.result()
            except (GDetKDError, OSError, RuntimeError) as error:  # RuntimeError: torch's, out of memory for one
                failures.append(f"{trial.title}: {error}")
                observer(Note(failures[-1]))
            except KeyboardInterrupt as interrupt:
                pool.shutdown(wait=False, cancel_futures=True)  # else the others would still be run
                interrupt.add_note("the same command goes on where it was")
                raise
    return failures


def places(settings: ComputeSettings, jobs: int) -> list[Place]:
    """One for each of the ``jobs``; they share GPUs where there are fewer."""
    if settings.device != "cuda":
        return [Place(settings.device)] * jobs
    count = torch.cuda.device_count()
    # By the names that this process was given: its device 0 may be the machine's device 3.
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = given.split(",")[:count]
    return [Place(f"cuda:{i % count}", {"CUDA_VISIBLE_DEVICES": names[i % count]}) for i in range(jobs)]


def train_trial(trial: Trial, recipe: Recipe, place: Place) -> None:
    """Trains the trial's student in a process, unless it is trained.

    Raises:
        GDetKDError: the process failed, or one of an earlier call is still at it.
    """
    run = trial.run
    if run.metrics.exists():
        return
    if run.path.exists():
        with run.lock():  # the process of a call that was killed may have outlived it
            run.recover_resume()
    command = [sys.executable, "-m", "gdetkd_cli", "distill" if recipe.distill else "train", "--json"]
    if run.resume.exists():
        command += ["--resume", str(run.path)]
    else:
        shutil.rmtree(run.path, ignore_errors=True)  # killed before its first checkpoint
        trial.folder.mkdir(parents=True, exist_ok=True)
        own = trial.folder / "recipe.yaml"
        write_text(own, dump_recipe(recipe))
        command += ["--recipe", str(own), "--output", str(run.path)]
    if code_is_trusted():
        command.append("--trust-code")
    log = trial.folder / "log.txt"
    with log.open("a") as told:
        environment = {**os.environ, **place.environment}
        code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=told, check=False, env=environment).returncode
    if code < 0:
        name = signal.Signals(-code).name
        reason = " (often: too little memory)" if name == "SIGKILL" else ""
        raise GDetKDError(f"its process was ended by {name}{reason}; the same command goes on where it was ({log})")
    if code:
        said = log.read_text().strip().splitlines()
        raise GDetKDError(f"{said[-1] if said else f'exit code {code}'} ({log})")


def _predict(trial: Trial, recipe: Recipe, settings: ComputeSettings, place: Place) -> None:
    """Writes what the trial's student detects in the validation images, in float32, as its own evaluation saw it."""
    loaded = catalog.load(catalog.locate(str(trial.run.path)))
    module = loaded.detector.module.to(place.device)
    if settings.channels_last:
        module.to(memory_format=torch.channels_last)
    split = assembly.relabel(assembly.build_split(recipe.data, "val"), loaded.detector)
    batches = validation_batches(split=split, batch_size=recipe.train.batch_size)
    found = predict_split(loaded.detector, batches, place.device)
    fresh = trial.detections.with_suffix(".tmp")
    torch.save({number: vars(one) for number, one in found.items()}, fresh)
    fresh.replace(trial.detections)
