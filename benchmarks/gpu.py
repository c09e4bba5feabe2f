"""What only a GPU can tell: cost of a step, half precision, a table on photographs, two processes on one card.

python benchmarks/gpu.py --output runs/gpu --minutes 8            # again, until nothing is left
python benchmarks/gpu.py --output runs/dry --device cpu --small   # every part on a CPU, tiny

Each call works for at most ``--minutes`` and goes on where the last one stopped. ``results.jsonl`` in the output folder
has one line for each finished measurement, which is never repeated; training that is cut resumes from its checkpoint.
Needs no network. Measurements run in processes of their own, so that each one's memory can be told.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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

from gpu_summary import METHODS, PRECISIONS, summary

ROOT = Path(__file__).resolve().parents[1]
CHILDREN = Path(__file__).with_name("gpu_children.py")
_HANGS = 150.0  # seconds after which two processes are taken to wait for each other
MARGIN = 15.0  # seconds of a slice kept for ending what runs, and for the summary


@dataclass(frozen=True)
class Settings:
    """What is measured, where, and how large. ``jobs``: chains, and students of a table, that run at the same time."""

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
    """One thing to find out.

    Attributes:
        key: its name in ``results.jsonl``.
        least: seconds that must be left for it to be begun.
        work: (seconds left) -> what was found; None where time ran out, and the next call goes on.
        chain: measurements of one chain run one after another, chains side by side; ``timed`` runs before all others.
    """

    key: str
    least: float
    work: Callable[[float], dict[str, Any] | None]
    chain: str = ""


# ------------------------------------------------------------------------------------------------------ bookkeeping


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished measurements by key. A line that was cut while it was written is not finished."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def add_result(path: Path, key: str, facts: Mapping[str, Any]) -> None:
    """Appends a finished measurement, on a line of its own even after one that was cut."""
    cut = path.exists() and not path.read_text().endswith("\n") and path.stat().st_size
    with path.open("a") as file:
        file.write(("\n" if cut else "") + json.dumps({"key": key, **facts}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def left_of(measurements: Sequence[Measurement], finished: Mapping[str, Any]) -> list[Measurement]:
    """Those that are not finished, in their order."""
    return [one for one in measurements if one.key not in finished]


def work_on(
    measurements: Sequence[Measurement],
    results: Path,
    deadline: float,
    jobs: int = 1,
    now: Callable[[], float] = monotonic,
) -> None:
    """Runs what is left until the deadline: the chain ``timed`` alone and first, then the others, ``jobs`` at a time.

    A measurement that fails is reported, and tried again by the next call.
    """
    chains: dict[str, list[Measurement]] = {"timed": []}
    for measurement in left_of(measurements, read_results(results)):
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
        print(f"{measurement.key}: cut; the next call goes on", flush=True)
    return facts


def run(command: Sequence[str], seconds: float, log: Path) -> str | None:
    """What a command prints; None where it was ended for time, with all the processes that it had started.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as told:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=told, text=True, env=environment, cwd=ROOT, start_new_session=True
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
        said = log.read_text().strip().splitlines()
        raise RuntimeError(f"exit code {process.returncode}: {said[-1] if said else 'nothing said'} ({log})")
    return printed


# ----------------------------------------------------------------------------------------------------- measurements


def measurements_of(settings: Settings) -> list[Measurement]:
    """All of them, the cheapest and most informative first."""
    found = [_step_ratio(settings, precision) for precision in PRECISIONS]
    found += [_bccd_teacher(settings), _bccd_students(settings), _two_processes(settings)]
    found.append(_child(settings, "pasted", 45, [], "pasted", images=1 if settings.small else 100))
    for precision in PRECISIONS:
        for kind in ("plain", "distilled"):
            options = {"chain": "memory", "plain": kind == "plain"}
            key = f"cost-{precision}-memory-{kind}"
            found.append(_child(settings, key, 45, _cost(settings, precision), "memory", **options))
    return [*found, *(_shapes(settings, precision) for precision in PRECISIONS)]


def _gdetkd(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gdetkd_cli", *arguments]


def _sets(overrides: Sequence[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _least(settings: Settings, seconds: float) -> float:
    return 10 if settings.small else seconds


def _cost(settings: Settings, precision: str) -> list[str]:
    """R50 from X101 at 800 pixels, batch 8, on drawn scenes and with fresh weights: docs/benchmarks.md."""
    size, scenes, batch = ([96, 128], 96, 2) if settings.small else ([800, 1333], 800, 8)
    student, teacher = _detector(settings, "resnet50", size), _detector(settings, "resnext101_64x4d", size)
    return [
        *settings.runtime,
        f"runtime.precision={precision}",
        f"data={{format: synthetic, size: {scenes}, train_images: 16, val_images: 2}}",
        f"student={json.dumps(student)}",
        f"teacher={json.dumps(teacher)}",
        "augment.multi_scale=null",
        f"train.batch_size={batch}",
    ]


def _detector(settings: Settings, backbone: str, size: Sequence[int]) -> dict[str, Any]:
    """A Faster R-CNN with fresh weights; a dry run's is as slim as can be."""
    block = {"arch": "composed", "backbone": backbone, "head": "faster-rcnn", "image_size": list(size)}
    slim = {
        "backbone": "resnet18",
        "width": 8,
        "blocks": [1, 1, 1, 1],
        "pyramid_channels": 16,
        "arguments": {"representation_size": 32, "rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 20},
    }
    return block | (slim if settings.small else {})


def _child(
    settings: Settings,
    key: str,
    least: float,
    overrides: Sequence[str],
    name: str,
    chain: str = "",
    **options: Any,
) -> Measurement:
    """A measurement by a function of ``gpu_children.py``."""
    given = {"overrides": list(overrides), "device": settings.device, "small": settings.small, **options}

    def work(seconds: float) -> dict[str, Any] | None:
        command = [sys.executable, str(CHILDREN), name, json.dumps(given)]
        printed = run(command, seconds, settings.output / "log.txt")
        return None if printed is None else json.loads(printed.strip().splitlines()[-1])

    return Measurement(key, _least(settings, least), work, chain)


def _step_ratio(settings: Settings, precision: str) -> Measurement:
    def work(seconds: float) -> dict[str, Any] | None:
        steps = "2" if settings.small else "12"
        command = _gdetkd("bench", "paper/coco-frcnn-r50-x101", "--json", "--steps", steps)
        printed = run([*command, *_sets(_cost(settings, precision))], seconds, settings.output / "log.txt")
        return None if printed is None else json.loads(printed)

    return Measurement(f"cost-{precision}-step", _least(settings, 60), work, chain="timed")


def _two_processes(settings: Settings) -> Measurement:
    steps = 2 if settings.small else 10
    given = json.dumps({"steps": steps, "overrides": settings.runtime, "most": int(_HANGS)})

    def work(seconds: float) -> dict[str, Any] | None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        printed = run([*launch, str(CHILDREN), "processes", given], min(seconds, _HANGS), settings.output / "log.txt")
        if printed is None:
            raise RuntimeError(
                f"not finished after {min(seconds, _HANGS):.0f} s; it hangs, or too little time was left"
            )
        return json.loads(printed.strip().splitlines()[-1])

    return Measurement("two-processes", _least(settings, 60), work)


def _shapes(settings: Settings, precision: str) -> Measurement:
    overrides = [*settings.runtime, f"runtime.precision={precision}", "train.checkpoint_every=50"]
    if settings.small:
        overrides += ["data.train_images=8", "data.val_images=4", "train.steps=4", "train.batch_size=2"]
    start = ["distill", "--recipe", "shapes/frcnn-frcnn", *_sets(overrides)]
    folder = settings.output / f"shapes-{precision}"
    return Measurement(f"shapes-{precision}", _least(settings, 40), lambda seconds: train_slice(start, folder, seconds))


def train_slice(start: Sequence[str], folder: Path, seconds: float) -> dict[str, Any] | None:
    """Trains to the end, or until time is up: begun by the command ``start``, or resumed from its checkpoint."""
    metrics = folder / "metrics.json"
    if not metrics.exists():
        resumes = (folder / "resume" / "progress.json").exists() or (folder / "resume.new" / "progress.json").exists()
        if folder.exists() and not resumes:
            shutil.rmtree(folder)  # cut before its first checkpoint
        where = ["--resume", str(folder)] if resumes else ["--output", str(folder)]
        arguments = [start[0], *where, "--json"] if resumes else [*start, *where, "--json"]
        if run(_gdetkd(*arguments), seconds, folder.with_name(f"{folder.name}-log.txt")) is None:
            return None
    facts = json.loads(metrics.read_text())
    return {name: facts[name] for name in ("AP", "AP50", "steps", "seconds_per_step", "peak_memory_mb")}


# ------------------------------------------------------------------------------------------------------------- BCCD


def bccd_recipe(settings: Settings, backbone: str, steps: int) -> dict[str, Any]:
    """Faster R-CNN from scratch on images as they are, 640 x 480 pixels."""
    size = [64, 96] if settings.small else [480, 640]
    runtime = {"device": settings.device, "workers": 0 if settings.small else 2}
    return {
        "name": f"bccd-{backbone}",
        "data": {"format": "coco", "root": str(settings.bccd.resolve())},
        "student": _detector(settings, backbone, size),
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


def _bccd_teacher(settings: Settings) -> Measurement:
    folder = settings.output / "bccd" / "teacher"

    def work(seconds: float) -> dict[str, Any] | None:
        _check_bccd(settings)
        recipe = _write_recipe(folder.with_name("teacher.yaml"), bccd_recipe(settings, "resnet50", 600))
        return train_slice(["train", "--recipe", recipe], folder, seconds)

    return Measurement("bccd-teacher", _least(settings, 60), work, chain="bccd")


def _bccd_students(settings: Settings) -> Measurement:
    folder = settings.output / "bccd"

    def work(seconds: float) -> dict[str, Any] | None:
        _check_bccd(settings)
        if not (folder / "teacher" / "metrics.json").exists():
            raise RuntimeError("waits for bccd-teacher")
        own = bccd_recipe(settings, "resnet18", 300)
        own |= {"teacher": {"arch": "checkpoint", "path": str((folder / "teacher").resolve())}, "distill": {}}
        command = _gdetkd("compare", _write_recipe(folder / "students.yaml", own), "--methods", ",".join(METHODS))
        command += ["--seeds", "1" if settings.small else "3", "--jobs", str(settings.jobs)]
        printed = run([*command, "--output", str(folder / "table"), "--json"], seconds, folder / "log.txt")
        return None if printed is None else {"trials": len(bccd_trials(folder / "table"))}

    return Measurement("bccd-students", _least(settings, 60), work, chain="bccd")


def _check_bccd(settings: Settings) -> None:
    if not (settings.bccd / "train.json").exists():
        raise RuntimeError(f"{settings.bccd} has no train.json; name the data set's folder with --bccd")


def bccd_trials(table: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Metrics of the finished students by method and seed, whether or not the table is finished."""
    found = {}
    for written in sorted(table.glob("*/detections.pt")):  # written last
        method, _, seed = written.parent.name.rsplit("-", 2)
        found[method, int(seed)] = json.loads((written.parent / "run" / "metrics.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results; one that exists is continued"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="most that this call may take")
    parser.add_argument(
        "--bccd", type=Path, default=ROOT / "../shared/data/bccd", help="folder with train.json, val.json"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that every part works")
    parser.add_argument("--jobs", type=int, default=4, help="measurements, and students, at the same time")
    options = parser.parse_args()
    deadline = monotonic() + 60 * options.minutes - MARGIN
    output = options.output.resolve()
    settings = Settings(output, options.bccd, options.device, options.small, 2 if options.small else options.jobs)
    output.mkdir(parents=True, exist_ok=True)
    measurements, results = measurements_of(settings), output / "results.jsonl"
    work_on(measurements, results, deadline, settings.jobs)
    finished = read_results(results)
    left = [one.key for one in left_of(measurements, finished)]
    print(f"\ndone: {', '.join(finished) or 'nothing'}\nleft: {', '.join(left) or 'nothing'}\n")
    text = summary(finished, bccd_trials(output / "bccd" / "table"))
    title = "Dry run with tiny sizes: these numbers mean nothing.\n\n" if settings.small else ""
    (output / "summary.md").write_text(title + text + "\n")
    print(title + text)


if __name__ == "__main__":
    main()
