"""Kills real runs at random instants, and checks that each resumes to the same bytes.

    python benchmarks/kills.py --output runs/kills --count 50

Each round starts a run, kills it and all its processes with SIGKILL after a random time, and continues it to its end.
The student's file and the log must then equal those of a run that nobody stopped. A share of the rounds has two
processes, and a share kills ``gdetkd compare`` with two trials at a time. Rounds are drawn from ``--seed``, so a failed
round can be repeated; its folder is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil

from gdetkd_cli.engine.run_folder import RunFolder

_CHANGES = [
    "data.train_images=16",
    "data.val_images=6",
    "student.width=8",
    "student.pyramid_channels=48",
    "train.steps=40",
    "train.batch_size=2",
    "train.log_every=3",
    "train.checkpoint_every=5",
    "train.evaluate_every=10",
    "runtime.threads=1",
    "runtime.workers=0",
    "runtime.device=cpu",
]


@dataclass(frozen=True)
class Kind:
    """A command to kill: its name, its arguments without a folder, and the runs in its folder."""

    name: str
    command: tuple[str, ...]
    runs: tuple[str, ...]

    def build(self, folder: Path) -> list[str]:
        return [*self.command, "--output", str(folder)]


def build_kinds() -> list[Kind]:
    changes = [word for change in _CHANGES for word in ("--set", change)]
    alone = (sys.executable, "-m", "gdetkd_cli")
    pair = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gdetkd_cli")
    distill = ("distill", "--recipe", "shapes/frcnn-frcnn", *changes, "--resume", "auto")
    compare = ("compare", "shapes/frcnn-frcnn", *changes, "--methods", "none,gdetkd", "--seeds", "1", "--jobs", "2")
    return [
        Kind("one process", (*alone, *distill), (".",)),
        Kind("two processes", (*pair, *distill), (".",)),
        Kind("compare", (*alone, *compare), ("none-40-0/run", "gdetkd-40-0/run")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    kinds = build_kinds()
    whole = {kind.name: run_whole(kind, options.output / kind.name.replace(" ", "-")) for kind in kinds}
    failed = 0
    for number in range(options.count):
        kind = generator.choices(kinds, weights=(3, 1, 1))[0]
        reference, seconds = whole[kind.name]
        moment = generator.uniform(0, seconds)
        folder = options.output / f"round-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        state = kill_after(kind, folder, moment)
        problem = continue_and_compare(kind, folder, reference)
        print(f"{number}: {kind.name}, killed after {moment:.1f} s ({state}): {problem or 'equal'}", flush=True)
        failed += problem is not None
        if problem is None:
            shutil.rmtree(folder)
    print(f"{options.count} kills, {failed} failed", flush=True)
    sys.exit(bool(failed))


def run_whole(kind: Kind, folder: Path) -> tuple[Path, float]:
    """Runs a command to its end; returns its folder and its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    start = perf_counter()
    subprocess.run(kind.build(folder), check=True, capture_output=True)
    return folder, perf_counter() - start


def kill_after(kind: Kind, folder: Path, seconds: float) -> str:
    """Starts a command and kills it and all its processes; returns the step of its last checkpoint, for display."""
    process = subprocess.Popen(
        kind.build(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        started = psutil.Process(process.pid)
        # Not by its group: torchrun's processes have groups of their own, and would finish the run.
        for each in (started, *started.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
    return ", ".join(f"steps saved: {RunFolder(folder / run).checkpoints().list_steps()}" for run in kind.runs)


def continue_and_compare(kind: Kind, folder: Path, reference: Path) -> str | None:
    """Continues a command to its end; returns what went wrong, None if its runs equal the reference's."""
    done = subprocess.run(kind.build(folder), capture_output=True, text=True, check=False)
    if done.returncode:
        (folder / "stderr.txt").write_text(done.stderr)
        return f"exit code {done.returncode}: its messages are in stderr.txt"
    for run in kind.runs:
        if (folder / run / "student.pt").read_bytes() != (reference / run / "student.pt").read_bytes():
            return f"{run}: another student"
        if read_log(folder / run) != read_log(reference / run):
            return f"{run}: another log"
    return None


def read_log(run: Path) -> list[str]:
    """The lines of the log without the speed, which no run repeats."""
    lines = RunFolder(run).read_log()
    return [json.dumps({name: value for name, value in line.items() if name != "images_per_second"}) for line in lines]


if __name__ == "__main__":
    main()
