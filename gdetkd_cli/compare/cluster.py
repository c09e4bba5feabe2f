"""Runs trials as jobs of a scheduler, through submitit. A job can be stopped and requeued at any time."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal

from gdetkd_cli.compare.trials import Children, Trial, train_trial
from gdetkd_cli.engine.signals import StopSignals
from gdetkd_cli.errors import GDetKDError, LauncherError, get_first_line
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.trust import is_code_trusted, trust_code

_SHARED = {"name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "slurm": {"timeout_min": 240, "cpus_per_task": 4, "additional_parameters": {"requeue": True}},
    "local": {"timeout_min": 7 * 24 * 60},
}
_REQUEUES = 1000  # after a time limit
_PAUSE = 1.0  # seconds between two looks at a job


@dataclass(frozen=True)
class Launcher:
    """A scheduler and what each job asks of it.

    Attributes:
        name: ``slurm``, or ``local`` for processes of this machine.
        settings: submitit's parameters of a job; other names are the scheduler's own, such as ``partition``.
    """

    name: Literal["slurm", "local"]
    settings: Mapping[str, object] = field(default_factory=dict)


class Cluster:
    """Submits trials as jobs and waits for them. Thread-safe.

    Args:
        folder: for the jobs' files; all machines see it.

    Raises:
        LauncherError: submitit is not installed, there is no such scheduler here, or it refuses the settings.
    """

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        name = launcher.name
        try:
            import submitit
        except ImportError as error:
            raise LauncherError(
                f"--launcher {name} needs submitit, which is not installed; in gdetkd's folder, run: "
                "pip install '.[slurm]'"
            ) from error
        parameters = {
            key if key in _SHARED or key.startswith(f"{name}_") else f"{name}_{key}": value
            for key, value in (_DEFAULTS[name] | dict(launcher.settings)).items()
        }
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=name, slurm_max_num_timeout=_REQUEUES)
            self._executor.update_parameters(**{"name": "gdetkd"} | parameters)
        except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
            raise LauncherError(f"--launcher {name}: {get_first_line(error)}") from error
        self._submitting = Lock()
        self._jobs: set[Any] = set()
        self._stopped = Event()

    def run(self, trial: Trial, recipe: Recipe) -> None:
        """Runs one trial to its end, in as many starts as the scheduler allows.

        Raises:
            GDetKDError: the trial failed, or the scheduler ended it for good.
        """
        with self._submitting:
            if self._stopped.is_set():
                raise GDetKDError("stopped before its job was submitted")
            job = self._executor.submit(TrialJob(trial, recipe, trusted=is_code_trusted()))
            self._jobs.add(job)
        while not job.done():
            if self._stopped.wait(_PAUSE):
                raise GDetKDError(f"job {job.job_id} was cancelled; run the same command again to continue")
        self._jobs.discard(job)
        error = job.exception()
        if error is not None:
            raise GDetKDError(f"job {job.job_id} ended without a result: {get_first_line(error)} ({job.paths.stderr})")
        if failure := job.result():
            raise GDetKDError(failure)

    def stop(self) -> None:
        """Cancels all jobs; those that run write a checkpoint."""
        with self._submitting:
            self._stopped.set()
            for job in list(self._jobs):
                job.cancel()


@dataclass
class TrialJob:
    """One trial as a job: its run goes on from the newest checkpoint whenever the job starts again."""

    trial: Trial
    recipe: Recipe
    trusted: bool

    def __call__(self) -> str:
        """Trains and evaluates the student; returns the reason if that failed, else an empty text."""
        trust_code(self.trusted)
        # In a thread, because the main thread handles the scheduler's signals and then waits for the training process.
        with StopSignals().installed(), ThreadPoolExecutor(max_workers=1) as pool:
            work = pool.submit(train_trial, self.trial, self.recipe, children=_children)
            try:
                work.result()
            except KeyboardInterrupt:
                _children.stop()
                raise
            except (GDetKDError, OSError, RuntimeError) as error:  # RuntimeError: for example torch is out of memory
                return str(error)
        return ""

    def checkpoint(self) -> Any:
        """Lets the training process write a checkpoint and end; submitit calls this before it requeues the job."""
        from submitit.helpers import DelayedSubmission

        _children.stop()
        return DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # its name in later versions of submitit


_children = Children()  # of this job
