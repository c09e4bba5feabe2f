"""What ``gpu.py`` measures in processes of their own; each prints one line of JSON.

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
from precision import ap_of, for_large_images
from torch import distributed

from gdetkd_cli.commands.plan import endless_batches, prepare_steps
from gdetkd_cli.engine.device import peak_memory_mb
from gdetkd_cli.engine.loop import seed_everything
from gdetkd_cli.recipe.checks import remove_teacher
from gdetkd_cli.recipe.load import load_recipe

_MEMORY_STEPS = 4


def memory(options: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a few training steps, with distillation or without."""
    recipe = load_recipe("paper/coco-frcnn-r50-x101", options["overrides"])
    if options.get("plain"):
        recipe = remove_teacher(recipe)
    setup, stepper = prepare_steps(recipe)
    batches = endless_batches(setup)
    for _ in range(2 if options["small"] else _MEMORY_STEPS):
        stepper.distil(next(batches).to(stepper.device))
    name = torch.cuda.get_device_name() if options["device"] == "cuda" else "cpu"
    return {"peak_memory_mb": peak_memory_mb(stepper.device), "device": name}


def pasted(options: dict[str, Any]) -> dict[str, Any]:
    """AP of the shipped teacher on scenes far from the corner of a large image, in float32 and in bfloat16."""
    detector = for_large_images("builtin:shapes-teacher", options["device"])
    dtypes = {"fp32": None, "bf16": torch.bfloat16}
    found = {name: ap_of(detector, options["images"], options["device"], dtype) for name, dtype in dtypes.items()}
    return {"images": options["images"], **found}


def processes(options: dict[str, Any]) -> dict[str, Any]:
    """A few steps of one distillation by two processes that share a device.

    NCCL refuses two ranks on one GPU, so they talk through gloo.
    """
    signal.alarm(options["most"])  # torchrun's processes outlive it when it is killed
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine without a network has no other
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
    told: list[Any] = [None] * world
    distributed.all_gather_object(told, {"finite": finite, "equal": torch.equal(first, own)})
    facts = {name: all(one[name] for one in told) for name in ("finite", "equal")}
    backend = distributed.get_backend()
    distributed.destroy_process_group()
    return {"steps": options["steps"], "backend": backend, "device": str(stepper.device), **facts} if rank == 0 else {}


def main() -> None:
    name, options = sys.argv[1:]
    found = {"memory": memory, "pasted": pasted, "processes": processes}[name](json.loads(options))
    if found:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
