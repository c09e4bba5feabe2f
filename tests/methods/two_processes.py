"""Runs a function in two processes that are joined by gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle  # comes with submitit
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes


def run_in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Runs ``work(rank)`` in two processes; returns what each computed. A hang is an error."""
    # Not fork: autograd refuses it if a test before this one has started its threads.
    module = sys.modules[work.__module__]
    cloudpickle.register_pickle_by_value(module)  # a test's module cannot be imported by name
    try:
        pickled = cloudpickle.dumps(work)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    start_processes(_enter, args=(pickled, folder), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _enter(rank: int, pickled: bytes, folder: Path) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    torch.save(cloudpickle.loads(pickled)(rank), folder / f"{rank}.pt")
    distributed.barrier()  # a process that leaves early breaks the other's connection
    distributed.destroy_process_group()
    # Not the usual end: under load, gloo's threads can abort a process whose work is done ("terminate called ...").
    os._exit(0)
