"""Measurements that need a GPU: cost of a step, half precision, a comparison on photographs, two processes on one GPU.

python benchmarks/gpu.py --output runs/gpu --minutes 8            # repeat until nothing is left
python benchmarks/gpu.py --output runs/dry --device cpu --small   # every part on a CPU, tiny

Each call runs for at most ``--minutes`` and continues where the last one stopped. ``results.jsonl`` in the output
folder has one line for each finished measurement, which is never repeated; interrupted training resumes from its
checkpoint. No network is needed. Each measurement runs in its own process, so that its memory can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

from gpu_summary import METHODS, PRECISIONS, write_summary

ROOT = Path(__file__).resolve().parents[1]
CHILDREN = Path(__file__).with_name("gpu_children.py")
_HANGS = 150.0  # seconds after which two processes count as deadlocked
MARGIN = 15.0  # seconds of a call reserved for stopping processes and for the summary


@dataclass(frozen=True)
class Settings:
    """Options of a call. ``jobs``: number of chains, and of students in a comparison, that run at the same time."""

    output: Path
    bccd: Path
    device: str
    small: bool
    jobs: int

    @property
    def runtime(self) -> list[str]:
        return [f"runtime.device={self.device}", *(["runtime.threads=1"] if self.small else [])]


@dataclass(frozen=True)
class Measurement:
    """A measurement.

    Attributes:
        key: its name in ``results.jsonl``.
        least: seconds that must be left to start it.
        work: (seconds left) -> results, or None if time ran out; the next call then continues it.
        chain: measurements of a chain run in order, chains in parallel; the chain ``timed`` runs before all others.
    """

    key: str
    least: float
    work: Callable[[float], dict[str, Any] | None]
    chain: str = ""


# ------------------------------------------------------------------------------------------------------ bookkeeping


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Reads finished measurements by key, without incomplete lines."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def add_result(path: Path, key: str, facts: Mapping[str, Any]) -> None:
    """Appends a finished measurement on a new line, even after an incomplete one."""
    cut = path.exists() and not path.read_text().endswith("\n") and path.stat().st_size
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps({"key": key, **facts}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def list_unfinished(measurements: Sequence[Measurement], finished: Mapping[str, Any]) -> list[Measurement]:
    """Returns the unfinished measurements in their order."""
    return [measurement for measurement in measurements if measurement.key not in finished]


def work_on(
    measurements: Sequence[Measurement],
    results: Path,
    deadline: float,
    jobs: int = 1,
    now: Callable[[], float] = monotonic,
) -> None:
    """Runs the unfinished measurements until the deadline: first the chain ``timed``, then ``jobs`` chains at a time.

    Failures are printed; the next call repeats them.
    """
    chains: dict[str, list[Measurement]] = {"timed": []}
    for measurement in list_unfinished(measurements, read_results(results)):
        chains.setdefault(measurement.chain or measurement.key, []).append(measurement)
    writing = Lock()

    def work(chain: Sequence[Measurement]) -> None:
        for measurement in chain:
            start = now()
            facts = _attempt(measurement, deadline - start)
            if facts is None:
                continue
            with writing:
                add_result(results, measurement.key, facts)
            print(f"{measurement.key}: done in {now() - start:.0f} s", flush=True)

    work(chains.pop("timed"))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, chains.values()))


def _attempt(measurement: Measurement, seconds: float) -> dict[str, Any] | None:
    if seconds < measurement.least:
        print(f"{measurement.key}: needs {measurement.least:.0f} s, {max(0, seconds):.0f} s are left", flush=True)
        return None
    try:
        facts = measurement.work(seconds)
    except RuntimeError as error:
        print(f"{measurement.key}: failed: {error}", flush=True)
        return None
    if facts is None:
        print(f"{measurement.key}: out of time; the next call continues", flush=True)
    return facts


def run(command: Sequence[str], seconds: float, log: Path) -> str | None:
    """Runs a command and returns its output; None if it ran out of time and was killed with its child processes.

    Raises:
        RuntimeError: the command failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=max(1.0, seconds))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(stop, KeyboardInterrupt):
                raise
            return None
    if process.returncode:
        lines = log.read_text().strip().splitlines()
        raise RuntimeError(f"exit code {process.returncode}: {lines[-1] if lines else 'no output'} ({log})")
    return printed


# ----------------------------------------------------------------------------------------------------- measurements


def list_measurements(settings: Settings) -> list[Measurement]:
    """Lists all measurements, the cheapest and most informative first."""
    listed = [_measure_step_ratio(settings, precision) for precision in PRECISIONS]
    listed += [_train_bccd_teacher(settings), _train_bccd_students(settings), _run_two_processes(settings)]
    listed.append(_run_child(settings, "pasted", 45, [], "pasted", images=1 if settings.small else 100))
    for precision in PRECISIONS:
        for kind in ("plain", "distilled"):
            options = {"chain": "memory", "plain": kind == "plain"}
            key = f"cost-{precision}-memory-{kind}"
            listed.append(
                _run_child(settings, key, 45, _build_cost_overrides(settings, precision), "memory", **options)
            )
    return [*listed, *(_train_shapes(settings, precision) for precision in PRECISIONS)]


def _build_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gdetkd_cli", *arguments]


def _build_set_options(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _min_seconds(settings: Settings, seconds: float) -> float:
    return 10 if settings.small else seconds


def _build_cost_overrides(settings: Settings, precision: str) -> list[str]:
    """R50 from X101 at 800 pixels, batch 8, on built-in scenes and with fresh weights: docs/benchmarks/speed.md."""
    size, scenes, batch = ([96, 128], 96, 2) if settings.small else ([800, 1333], 800, 8)
    student, teacher = _build_detector(settings, "resnet50", size), _build_detector(settings, "resnext101_64x4d", size)
    return [
        *settings.runtime,
        f"runtime.precision={precision}",
        f"data={{format: synthetic, size: {scenes}, train_images: 16, val_images: 2}}",
        f"student={json.dumps(student)}",
        f"teacher={json.dumps(teacher)}",
        "augment.multi_scale=null",
        f"train.batch_size={batch}",
    ]


def _build_detector(settings: Settings, backbone: str, size: Sequence[int]) -> dict[str, Any]:
    """Describes a Faster R-CNN with fresh weights, as slim as possible for a dry run."""
    block = {"arch": "composed", "backbone": backbone, "head": "faster-rcnn", "image_size": list(size)}
    slim = {
        "backbone": "resnet18",
        "width": 8,
        "blocks": [1, 1, 1, 1],
        "pyramid_channels": 16,
        "arguments": {"representation_size": 32, "rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 20},
    }
    return block | (slim if settings.small else {})


def _run_child(
    settings: Settings,
    key: str,
    least: float,
    overrides: Sequence[str],
    name: str,
    chain: str = "",
    **options: Any,
) -> Measurement:
    """Builds a measurement that runs a function of ``gpu_children.py``."""
    given = {"overrides": list(overrides), "device": settings.device, "small": settings.small, **options}

    def work(seconds: float) -> dict[str, Any] | None:
        command = [sys.executable, str(CHILDREN), name, json.dumps(given)]
        printed = run(command, seconds, settings.output / "log.txt")
        return None if printed is None else json.loads(printed.strip().splitlines()[-1])

    return Measurement(key, _min_seconds(settings, least), work, chain)


def _measure_step_ratio(settings: Settings, precision: str) -> Measurement:
    def work(seconds: float) -> dict[str, Any] | None:
        steps = "2" if settings.small else "12"
        command = _build_command("bench", "paper/coco-frcnn-r50-x101", "--json", "--steps", steps)
        printed = run(
            [*command, *_build_set_options(_build_cost_overrides(settings, precision))],
            seconds,
            settings.output / "log.txt",
        )
        return None if printed is None else json.loads(printed)

    return Measurement(f"cost-{precision}-step", _min_seconds(settings, 60), work, chain="timed")


def _run_two_processes(settings: Settings) -> Measurement:
    steps = 2 if settings.small else 10
    given = json.dumps({"steps": steps, "overrides": settings.runtime, "most": int(_HANGS)})

    def work(seconds: float) -> dict[str, Any] | None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        printed = run([*launch, str(CHILDREN), "processes", given], min(seconds, _HANGS), settings.output / "log.txt")
        if printed is None:
            raise RuntimeError(f"not finished after {min(seconds, _HANGS):.0f} s: either a deadlock or too little time")
        return json.loads(printed.strip().splitlines()[-1])

    return Measurement("two-processes", _min_seconds(settings, 60), work)


def _train_shapes(settings: Settings, precision: str) -> Measurement:
    overrides = [*settings.runtime, f"runtime.precision={precision}", "train.checkpoint_every=50"]
    if settings.small:
        overrides += ["data.train_images=8", "data.val_images=4", "train.steps=4", "train.batch_size=2"]
    start = ["distill", "--recipe", "shapes/frcnn-frcnn", *_build_set_options(overrides)]
    folder = settings.output / f"shapes-{precision}"
    return Measurement(
        f"shapes-{precision}", _min_seconds(settings, 40), lambda seconds: train_slice(start, folder, seconds)
    )


def train_slice(start: Sequence[str], folder: Path, seconds: float) -> dict[str, Any] | None:
    """Trains until the end or until time is up. ``start``: the command, without its folder."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        arguments = [*start, "--output", str(folder), "--resume", "auto", "--json"]
        if run(_build_command(*arguments), seconds, folder.with_name(f"{folder.name}-log.txt")) is None:
            return None
    facts = json.loads(metrics.read_text())
    return {name: facts[name] for name in ("AP", "AP50", "steps", "seconds_per_step", "peak_memory_mb")}


# ------------------------------------------------------------------------------------------------------------- BCCD


def build_bccd_recipe(settings: Settings, backbone: str, steps: int) -> dict[str, Any]:
    """Builds the recipe of a Faster R-CNN trained from scratch on BCCD's images of 640 x 480 pixels."""
    size = [64, 96] if settings.small else [480, 640]
    runtime = {"device": settings.device, "workers": 0 if settings.small else 2}
    return {
        "name": f"bccd-{backbone}",
        "data": {"format": "coco", "root": str(settings.bccd.resolve())},
        "student": _build_detector(settings, backbone, size),
        "train": {
            "steps": 2 if settings.small else steps,
            "batch_size": 2 if settings.small else 8,
            "optimizer": {"lr": 3e-4, "weight_decay": 0.05},
            "checkpoint_every": 1 if settings.small else 50,
        },
        "runtime": runtime | ({"threads": 1} if settings.small else {}),
    }


def _write_recipe(path: Path, recipe: Mapping[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe, indent=2))  # YAML reads JSON
    return str(path)


def _train_bccd_teacher(settings: Settings) -> Measurement:
    folder = settings.output / "bccd" / "teacher"

    def work(seconds: float) -> dict[str, Any] | None:
        _check_bccd(settings)
        recipe = _write_recipe(folder.with_name("teacher.yaml"), build_bccd_recipe(settings, "resnet50", 600))
        return train_slice(["train", "--recipe", recipe], folder, seconds)

    return Measurement("bccd-teacher", _min_seconds(settings, 60), work, chain="bccd")


def _train_bccd_students(settings: Settings) -> Measurement:
    folder = settings.output / "bccd"

    def work(seconds: float) -> dict[str, Any] | None:
        _check_bccd(settings)
        if not (folder / "teacher" / "metrics.json").exists():
            raise RuntimeError("bccd-teacher is not finished")
        own = build_bccd_recipe(settings, "resnet18", 300)
        own |= {"teacher": {"arch": "checkpoint", "path": str((folder / "teacher").resolve())}, "distill": {}}
        command = _build_command(
            "compare", _write_recipe(folder / "students.yaml", own), "--methods", ",".join(METHODS)
        )
        command += ["--seeds", "1" if settings.small else "3", "--jobs", str(settings.jobs)]
        printed = run([*command, "--output", str(folder / "table"), "--json"], seconds, folder / "log.txt")
        return None if printed is None else {"trials": len(read_bccd_trials(folder / "table"))}

    return Measurement("bccd-students", _min_seconds(settings, 60), work, chain="bccd")


def _check_bccd(settings: Settings) -> None:
    if not (settings.bccd / "train.json").exists():
        raise RuntimeError(f"{settings.bccd} has no train.json; name the data set's folder with --bccd")


def read_bccd_trials(table: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Reads metrics of the finished trials by method and seed, also while the table is unfinished."""
    found = {}
    for written in sorted(table.glob("*/run/metrics.json")):
        method, _, seed = written.parts[-3].rsplit("-", 2)
        found[method, int(seed)] = json.loads(written.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; an existing one is continued"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of this call")
    parser.add_argument(
        "--bccd", type=Path, default=ROOT / "../shared/data/bccd", help="folder with train.json, val.json"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to check that every part works")
    parser.add_argument("--jobs", type=int, default=4, help="measurements, and students, at the same time")
    options = parser.parse_args()
    deadline = monotonic() + 60 * options.minutes - MARGIN
    output = options.output.resolve()
    settings = Settings(output, options.bccd, options.device, options.small, 2 if options.small else options.jobs)
    output.mkdir(parents=True, exist_ok=True)
    measurements, results = list_measurements(settings), output / "results.jsonl"
    work_on(measurements, results, deadline, settings.jobs)
    finished = read_results(results)
    left = [measurement.key for measurement in list_unfinished(measurements, finished)]
    print(f"\ndone: {', '.join(finished) or 'nothing'}\nleft: {', '.join(left) or 'nothing'}\n")
    text = write_summary(finished, read_bccd_trials(output / "bccd" / "table"))
    title = "Dry run with tiny sizes: these numbers mean nothing.\n\n" if settings.small else ""
    (output / "summary.md").write_text(title + text + "\n")
    print(title + text)


if __name__ == "__main__":
    main()
