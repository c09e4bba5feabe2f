"""Exchanges between the training processes; each function returns its input if there is one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad


def count_processes() -> int:
    """The number of training processes."""
    joined = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if joined else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums a tensor of one shape over all processes, without a gradient and without waiting for the device."""
    if count_processes() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


def compute_share(count: int, device: torch.device) -> Tensor | None:
    """The factor that makes the average of the processes' means a mean over the items of all; None for one process.

    Args:
        count: this process's items.
        device: of the exchange.
    """
    if (processes := count_processes()) == 1:
        return None
    own = torch.full((), float(count), device=device)
    return own * processes / sum_over_processes(own).clamp(min=1)


def gather_counts(count: int, device: torch.device) -> list[int]:
    """Gathers ``count`` of every process in rank order; several processes wait for the device once."""
    if count_processes() == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count_processes())]
    distributed.all_gather(counts, torch.full((1,), count, dtype=torch.int64, device=device))
    return torch.cat(counts).tolist()


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Gathers the rows of every process in rank order: (R_p, ...) -> (sum of R_p, ...).

    Args:
        rows: this process's.
        counts: R_p by process, from ``gather_counts``; None: gather them.
    """
    if count_processes() == 1:
        return rows
    counts = gather_counts(len(rows), rows.device) if counts is None else counts
    padded = pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
    parts = [torch.zeros_like(padded) for _ in counts]
    distributed.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
