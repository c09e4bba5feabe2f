"""Measures a stored teacher: a step with it, beside a plain step and one with the live teacher; its size; its memory.

    python benchmarks/teach.py steps --steps 5      # a ResNet-50 from a ResNeXt-101, 320 pixels, one thread
    python benchmarks/teach.py steps --steps 20 --recipe shapes/frcnn-frcnn --set runtime.threads=1
    python benchmarks/teach.py memory               # peak memory of three kinds of runs, each in a process of its own
    python benchmarks/teach.py formats              # one view in safetensors, numpy's memory map, npz and torch.save
    python benchmarks/teach.py compare --steps 150  # ten methods and three seeds on the scenes
    python benchmarks/teach.py compare --steps 150 --live-from CHECKOUT    # ... the first with an earlier version

The three kinds of steps take turns on the same batches in one process. Loading batches is not timed. On a CPU the times
are those of the processor, which other programs on the machine hardly change; run it with one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from time import perf_counter, process_time

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gdetkd_cli.assembly import build_detector
from gdetkd_cli.commands import run_teach
from gdetkd_cli.commands.plan import prepare_steps, repeat_batches
from gdetkd_cli.data.synthetic import CLASS_NAMES
from gdetkd_cli.engine.device import get_peak_memory_mb
from gdetkd_cli.engine.stepper import measure_seconds
from gdetkd_cli.knowledge.teacher import RememberedTeacher
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import Recipe

TABLE = "none,fitnet,pkd,cwd,fgd,gt_mask,roi_imitation,sgfi,sgfi+ckd,gdetkd"
KINDS = ("live", "memory", "knowledge")
PAIR = [
    "data={format: synthetic, train_images: 8, val_images: 2, size: 320}",
    "student.image_size=[320,533]",
    "student.backbone_weights=null",
    "augment.multi_scale=null",
    "train.batch_size=2",
    "runtime.threads=1",
]
TEACHER = "{arch: composed, backbone: resnext101_64x4d, head: faster-rcnn, image_size: [320, 533]%s}"


def build_recipe(overrides: list[str], teacher: str = TEACHER % "") -> Recipe:
    return load_recipe("paper/coco-frcnn-r50-x101", [*PAIR, f"teacher={teacher}", *overrides])


def measure_steps(name: str | None, steps: int, overrides: list[str]) -> dict[str, object]:
    """Times each kind of step in turn; the first round warms up."""
    overrides = ["distill.teacher_cache=memory", *overrides]
    setup, stepper = prepare_steps(load_recipe(name, overrides) if name else build_recipe(overrides))
    teacher = setup.distiller.teacher
    assert isinstance(teacher, RememberedTeacher)
    times: dict[str, list[float]] = {"plain": [], "live": [], "stored": [], "reading": [], "teacher": []}
    for number, loaded in enumerate(islice(repeat_batches(setup), 1 + steps)):
        batch = loaded.to(stepper.device)
        live = replace(batch, views=())  # without views, the teacher runs
        stepper.ask_teacher(batch)
        work: dict[str, Callable[[], object]] = {
            "plain": lambda batch=batch: stepper.plain(batch),  # type: ignore[misc]
            "live": lambda live=live: stepper.distil(live),  # type: ignore[misc]
            "stored": lambda batch=batch: stepper.distil(batch),  # type: ignore[misc]
            "reading": lambda batch=batch: stepper.ask_teacher(batch),  # type: ignore[misc]
            "teacher": lambda live=live: stepper.ask_teacher(live),  # type: ignore[misc]
        }
        names = list(work)
        random.Random(number).shuffle(names)
        for name in names:
            start = process_time()
            seconds = measure_seconds(work[name], stepper.device)
            if stepper.device.type == "cpu":
                seconds = process_time() - start
            if number:
                times[name].append(seconds)
    stored = [teacher.store.read(view.name) for view in batch.views]
    size = sum(value.nbytes for group in stored if group for value in group.values()) / len(stored)
    middle = {name: median(values) for name, values in times.items()}
    rounds = list(zip(times["plain"], times["live"], times["stored"], strict=True))
    return {
        "seconds": middle,
        "live / plain": median(live / plain for plain, live, _ in rounds),
        "stored / plain": median(stored / plain for plain, _, stored in rounds),
        "MB per view": size / 1e6,
    }


def measure_memory(overrides: list[str]) -> dict[str, float]:
    """Peak memory in MB of each kind of run, measured in a process that only does this.

    Linux counts a parent's peak as the child's, so this process builds nothing itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for kind in ("teach", *KINDS):
            command = [sys.executable, __file__, "child", "--kind", kind, "--folder", folder]
            command += [part for text in overrides for part in ("--set", text)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_child(kind: str, folder: Path, overrides: list[str]) -> float:
    knowledge, weights = folder / "knowledge", folder / "teacher.pt"
    if kind == "teach":
        spec = build_recipe(overrides).teacher
        assert spec is not None
        built = build_detector(spec, CLASS_NAMES, seed=0)
        torch.save(built.detector.module.state_dict(), weights)
        run_teach(build_recipe(overrides, TEACHER % f", weights: {weights}"), output=knowledge)
        return get_peak_memory_mb(torch.device("cpu"))
    teacher = f"{{arch: knowledge, path: {knowledge}}}" if kind == "knowledge" else TEACHER % ""
    mode = "memory" if kind == "memory" else "off"
    recipe = build_recipe([f"distill.teacher_cache={mode}", *overrides], teacher)
    setup, stepper = prepare_steps(recipe)
    for batch in islice(repeat_batches(setup), 4):
        on_device = batch.to(stepper.device)
        stepper.distil(on_device)
    return get_peak_memory_mb(stepper.device)


def measure_formats(views: int = 40) -> dict[str, dict[str, float]]:
    """Milliseconds to write and to read one view of a 320-pixel image, from the page cache."""
    levels = {f"level.{i}": torch.randn(256, 80 >> i, 80 >> i).half() for i in range(5)}
    size = sum(value.numel() for value in levels.values())
    order = random.Random(0).sample(range(views), views)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = np.lib.format.open_memmap(folder / "whole.npy", mode="w+", dtype=np.float16, shape=(views, size))

        def write_map(i: int) -> None:
            whole[i] = np.concatenate([value.numpy().reshape(-1) for value in levels.values()])

        def read_safetensors(i: int) -> float:
            with safe_open(folder / f"{i}.safetensors", framework="pt") as file:
                return sum(float(file.get_tensor(key).float().sum()) for key in levels)

        def read_npz(i: int) -> float:
            with np.load(folder / f"{i}.npz") as file:
                return sum(float(torch.from_numpy(file[key]).float().sum()) for key in levels)

        def read_torch(i: int) -> float:
            values = torch.load(folder / f"{i}.pt", weights_only=True, mmap=True)
            return sum(float(value.float().sum()) for value in values.values())

        arrays = {name: value.numpy() for name, value in levels.items()}
        formats: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {
            "safetensors": (lambda i: save_file(levels, folder / f"{i}.safetensors"), read_safetensors),
            "numpy memory map": (write_map, lambda i: float(torch.from_numpy(whole[i]).float().sum())),
            "npz": (lambda i: np.savez(folder / f"{i}.npz", **arrays), read_npz),  # type: ignore[arg-type]
            "torch.save": (lambda i: torch.save(levels, folder / f"{i}.pt"), read_torch),
        }
        for kind, (write, read) in formats.items():
            found[kind] = {what: time_each(work, order) for what, work in (("write", write), ("read", read))}
    return found


def time_each(work: Callable[[int], object], order: list[int]) -> float:
    times = []
    for i in order:
        start = perf_counter()
        work(i)
        times.append(1e3 * (perf_counter() - start))
    return median(times)


def measure_compare(
    steps: int, seeds: int, live_from: Path | None, overrides: list[str]
) -> dict[str, dict[str, object]]:
    """Runs one table with the live teacher and one with stored answers, each in processes of its own.

    The seconds are those of the processor, summed over all processes. ``live_from`` is a checkout whose ``compare``
    runs the first table, with its defaults.
    """
    found = {}
    for kind, root in (("live", live_from), ("stored", None)):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "gdetkd_cli", "compare", "shapes/frcnn-frcnn", "--methods", TABLE]
            command += ["--steps", str(steps), "--seeds", str(seeds), "--output", f"{folder}/table"]
            settings = ["runtime.threads=1", "runtime.workers=0", *overrides]
            settings += [] if root else [f"distill.teacher_cache={'off' if kind == 'live' else 'disk'}"]
            command += [part for text in settings for part in ("--set", text)]
            before = getrusage(RUSAGE_CHILDREN)
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            after = getrusage(RUSAGE_CHILDREN)
            with Path(folder, "table", "table.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found[kind] = {
            "seconds": seconds,
            "AP": {row["method"]: row["mean"] for row in rows},
            "MB": {row["method"]: row["peak_memory_mb"] for row in rows},
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "memory", "formats", "compare", "child"])
    parser.add_argument("--recipe", help="of `steps`, instead of the ResNet-50 from the ResNeXt-101")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="of `compare`")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--live-from", type=Path, metavar="CHECKOUT", help="of `compare`: an earlier version")
    parser.add_argument("--kind", choices=("teach", *KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "steps":
        print(json.dumps(measure_steps(options.recipe, options.steps, options.set), indent=1))
    elif options.what == "memory":
        print(json.dumps(measure_memory(options.set), indent=1))
    elif options.what == "compare":
        print(json.dumps(measure_compare(options.steps, options.seeds, options.live_from, options.set), indent=1))
    elif options.what == "formats":
        print(json.dumps(measure_formats(), indent=1))
    else:
        print(measure_child(options.kind, options.folder, options.set))


if __name__ == "__main__":
    main()
