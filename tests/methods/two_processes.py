"""Runs a function in two processes that are joined by gloo."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes


def run_in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Runs ``work(rank)`` in two processes; returns what each computed. A hang is an error."""

    def enter(rank: int) -> None:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=30),
        )
        torch.save(work(rank), folder / f"{rank}.pt")
        distributed.destroy_process_group()

    # fork, not spawn: the children need not import torch again.
    start_processes(enter, nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
