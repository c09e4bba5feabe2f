"""Joins the processes of a run, and names the reason if one of them is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

from torch import distributed

from gdetkd_cli.errors import LostProcessError

_PATIENCE = 600.0  # seconds; processes of other machines may start later
_PAUSE = 0.05  # seconds


def join_processes(device: str) -> None:
    """Joins the processes that torchrun started; does nothing for one process, or if they have joined.

    torchrun keeps one store over all restarts, and the addresses of dead processes stay in it. So the processes of one
    start agree on a new part of the store first.

    Args:
        device: ``cpu`` or ``cuda``, on which the processes exchange tensors.

    Raises:
        LostProcessError: another process did not join within ten minutes.
    """
    if distributed.is_initialized() or not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return
    untyped: Any = distributed
    store, rank, world_size = next(iter(untyped.rendezvous("env://")))
    part = untyped.PrefixStore(_agree_on_prefix(store, rank, world_size), store)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=part, rank=rank, world_size=world_size)


def _agree_on_prefix(store: Any, rank: int, world_size: int) -> str:
    """Returns a name that the first process chose and every other living process confirmed.

    Each process has a name that no earlier one had. An answer to that name comes from a process of the same start.
    """
    own, deadline = uuid4().hex, monotonic() + _PATIENCE
    store.set(f"gdetkd/{rank}", own)
    if rank:
        _wait(store, f"gdetkd/{own}", deadline)
        prefix = store.get(f"gdetkd/{own}").decode()
        store.set(f"gdetkd/{prefix}/{rank}", "")
        return prefix
    for other in range(1, world_size):
        while not store.check([f"gdetkd/{own}/{other}"]):
            _wait(store, f"gdetkd/{other}", deadline)
            store.set(f"gdetkd/{store.get(f'gdetkd/{other}').decode()}", own)
            sleep(_PAUSE)
    return own


def _wait(store: Any, key: str, deadline: float) -> None:
    """Waits for a key in Python, where a signal can stop it."""
    while not store.check([key]):
        if monotonic() > deadline:
            raise LostProcessError("another process of this run did not start; its own message gives the reason")
        sleep(_PAUSE)


@contextmanager
def lost_processes_reported() -> Iterator[None]:
    """Replaces the errors of an exchange with a process that has ended.

    Raises:
        LostProcessError: another process ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors.
        if isinstance(error, distributed.DistError) or "gloo" in str(error).lower():
            raise LostProcessError(
                "another process of this run ended or cannot be reached, so this one ends; the other's own message "
                "gives the reason"
            ) from error
        raise
