"""``gdetkd compare --launcher``: each trial is a job, which can be stopped and requeued."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import toy

from gdetkd_cli.commands import run_compare
from gdetkd_cli.compare.cluster import Cluster, Launcher, TrialJob
from gdetkd_cli.compare.trials import build_trial
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.errors import GDetKDError, LauncherError
from gdetkd_cli.recipe.methods import select_method

pytest.importorskip("submitit")


def test_trials_run_as_jobs(tmp_path: Path) -> None:
    heard: list[Event] = []
    recipe, launcher = toy.recipe(steps=3, student="retinanet"), Launcher("local", {"timeout_min": 10})
    for _ in range(2):  # the second call has nothing to do
        found = run_compare(
            recipe, methods=("none",), seeds=1, output=tmp_path, launcher=launcher, observer=heard.append
        )
        assert [list(row.ap) for row in found.rows] == [[0]] and not found.failures
    assert len(list((tmp_path / "jobs").glob("*_result.pkl"))) == 1
    assert Note("1 trials, 1 of them already finished") in heard


def test_a_job_returns_the_reason_of_its_failure(tmp_path: Path) -> None:
    trial = build_trial(tmp_path, "none", 3, 0)
    trial.run.path.mkdir(parents=True)
    trial.run.metrics.write_text("{}")  # it was trained, but its student is gone
    assert TrialJob(trial, toy.recipe(steps=3), trusted=False)().startswith(f"Error: {trial.run.path} exists already")


def find_training(run: Path) -> psutil.Process:
    """The process that trains in a folder."""
    processes = psutil.Process().children(recursive=True)
    (found,) = (process for process in processes if process.is_running() and str(run) in process.cmdline())
    return found


def wait_for(pattern: str, folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def _no_process_stays() -> Iterator[None]:
    """Ends the processes that a failed test leaves, which would train for minutes.

    Jobs are cancelled with SIGINT, which a shell lets its background processes ignore. ``compare`` handles it itself.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    for process in psutil.Process().children(recursive=True):
        process.kill()


@pytest.mark.usefixtures("_no_process_stays")
def test_a_job_is_requeued_and_cancelled_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = select_method(toy.recipe(checkpoint_every=100_000), "none", steps=100_000, seed=0)
    trial, cluster = build_trial(tmp_path, "none", 100_000, 0), Cluster(Launcher("local"), tmp_path / "jobs")
    with ThreadPoolExecutor() as pool:
        done = pool.submit(cluster.run, trial, recipe)
        try:
            wait_for("metrics.jsonl", trial.run.path)
            training = find_training(trial.run.path)
            job = training.parent()
            assert job is not None
            job.send_signal(signal.SIGUSR2)  # as SLURM does before the time limit
            training.wait(timeout=200)
            (first,) = trial.run.checkpoints().list_steps()
            count = len(trial.run.metrics_log.read_text().splitlines())
            assert count == first
            while len(trial.run.metrics_log.read_text().splitlines()) == count:  # until the job trains again
                assert done.running()
                time.sleep(0.01)
            training = find_training(trial.run.path)
        finally:
            cluster.stop()
        with pytest.raises(GDetKDError, match="was cancelled; run the same command again to continue"):
            done.result()
        training.wait(timeout=200)
    second = trial.run.checkpoints().list_steps()[-1]
    steps = [line["step"] for line in trial.run.read_log()]
    assert second > first and steps == list(range(1, second + 1))  # nothing was lost, and nothing ran twice
    with pytest.raises(GDetKDError, match="stopped before its job was submitted"):
        cluster.run(trial, recipe)


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        (Launcher("local", {"partitio": "gpu"}), "--launcher local: Unknown argument 'partitio' for executor 'local'"),
        (Launcher("local", {"timeout_min": "soon"}), '--launcher local: Parameter "timeout_min" expected type'),
    ],
)
def test_settings_that_the_launcher_refuses(launcher: Launcher, message: str, tmp_path: Path) -> None:
    with pytest.raises(LauncherError, match=message):
        Cluster(launcher, tmp_path)


def test_slurm_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LauncherError, match="--launcher slurm: Could not detect"):
        Cluster(Launcher("slurm"), tmp_path)
