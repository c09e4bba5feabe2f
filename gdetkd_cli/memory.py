"""Refuses what does not fit into memory before it is allocated: the system may end the process instead of failing."""

from __future__ import annotations

import re

import psutil

from gdetkd_cli.errors import MemoryLimitError

_BYTES = re.compile(r"allocate (\d+) bytes")


def check_memory(asker: str, size: int) -> None:
    """Checks that ``size`` bytes are free.

    Args:
        asker: the field and what it asks for, for the message.
        size: a lower bound of what will be used, in bytes.

    Raises:
        MemoryLimitError: less is free.
    """
    free = psutil.virtual_memory().available
    if size > free:
        raise MemoryLimitError(
            f"{asker} needs at least {_format_bytes(size)} of memory, and {_format_bytes(free)} are free; lower it"
        )


def describe_exhaustion(error: BaseException) -> str | None:
    """Returns one sentence if memory ran out, else None."""
    text = str(error)
    allocation = "can't allocate memory" in text or "out of memory" in text
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and allocation):
        return None
    asked = _BYTES.search(text)
    size = f" for {_format_bytes(int(asked[1]))}" if asked else ""
    free = _format_bytes(psutil.virtual_memory().available)
    return (
        f"memory ran out{size}; {free} of the host's are free: lower train.batch_size, the image size or "
        "runtime.cache_mb (see Memory in docs/troubleshooting.md)"
    )


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
