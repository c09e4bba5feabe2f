"""Which process prints, and its console."""

from __future__ import annotations

import os

from rich.console import Console


def is_first_process() -> bool:
    """Whether this is the only process or rank 0, by the variables that torchrun and accelerate set."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0


def build_console(*, stderr: bool = False) -> Console:
    """A console that prints text unchanged, without markup or coloured numbers."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
