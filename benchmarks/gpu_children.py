"""Measurements that ``gpu.py`` runs in separate processes; each prints one line of JSON.

python benchmarks/gpu_children.py memory|pasted|processes OPTIONS_AS_JSON
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from typing import Any

import torch
from precision import load_for_large_images, measure_ap
from torch import distributed

from gdetkd_cli.commands.plan import prepare_steps, repeat_batches
from gdetkd_cli.engine.device import get_peak_memory_mb
from gdetkd_cli.engine.loop import seed_everything
from gdetkd_cli.recipe.checks import remove_teacher
from gdetkd_cli.recipe.load import load_recipe

_MEMORY_STEPS = 4


def measure_memory(options: dict[str, Any]) -> dict[str, Any]:
    """Measures the peak memory of a few training steps, with or without distillation."""
    recipe = load_recipe("paper/coco-frcnn-r50-x101", options["overrides"])
    if options.get("plain"):
        recipe = remove_teacher(recipe)
    setup, stepper = prepare_steps(recipe)
    batches = repeat_batches(setup)
    for _ in range(2 if options["small"] else _MEMORY_STEPS):
        stepper.distil(next(batches).to(stepper.device))
    name = torch.cuda.get_device_name() if options["device"] == "cuda" else "cpu"
    return {"peak_memory_mb": get_peak_memory_mb(stepper.device), "device": name}


def measure_pasted(options: dict[str, Any]) -> dict[str, Any]:
    """Measures the shipped teacher's AP on scenes far from the corner of a large image, in float32 and bfloat16."""
    detector = load_for_large_images("builtin:shapes-teacher", options["device"])
    dtypes = {"fp32": None, "bf16": torch.bfloat16}
    found = {name: measure_ap(detector, options["images"], options["device"], dtype) for name, dtype in dtypes.items()}
    return {"images": options["images"], **found}


def run_processes(options: dict[str, Any]) -> dict[str, Any]:
    """Runs a few steps of one distillation in two processes on one device, over gloo: NCCL allows one rank per GPU."""
    signal.alarm(options["most"])  # if torchrun is killed, its processes survive
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the only interface of a machine without a network
    distributed.init_process_group("gloo")
    os.environ["LOCAL_RANK"] = "0"  # both on the first device
    rank, world = distributed.get_rank(), distributed.get_world_size()
    overrides = [*options["overrides"], "train.batch_size=2", "data.train_images=16", "data.val_images=2"]
    recipe = load_recipe("shapes/frcnn-frcnn", [*overrides, f"train.steps={options['steps']}"])
    setup, stepper = prepare_steps(recipe)
    seed_everything(recipe.seed, rank)
    finite = True
    for step, batch in enumerate(setup.batches(0)):
        stepper.distiller.step = step
        report = stepper.distil(batch.to(stepper.device))
        finite = finite and all(math.isfinite(float(part)) for part in report.parts.values())
    own = torch.cat([p.detach().float().flatten() for p in setup.student.detector.module.parameters()]).cpu()
    first = own.clone()
    distributed.broadcast(first, 0)
    gathered: list[Any] = [None] * world
    distributed.all_gather_object(gathered, {"finite": finite, "equal": torch.equal(first, own)})
    facts = {name: all(checks[name] for checks in gathered) for name in ("finite", "equal")}
    backend = distributed.get_backend()
    distributed.destroy_process_group()
    return {"steps": options["steps"], "backend": backend, "device": str(stepper.device), **facts} if rank == 0 else {}


def main() -> None:
    name, options = sys.argv[1:]
    found = {"memory": measure_memory, "pasted": measure_pasted, "processes": run_processes}[name](json.loads(options))
    if found:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
