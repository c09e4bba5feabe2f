"""Formats the table of ``gdetkd compare``, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from gdetkd_cli.cli.render import build_line, build_table, format_number

if TYPE_CHECKING:
    from gdetkd_cli.compare.table import Comparison, MethodRow


def format_comparison(result: Comparison) -> RenderableType:
    """Formats two tables per budget: gains and costs, then AP by seed and size."""
    tables: list[RenderableType] = []
    for steps, own in groupby(result.rows, key=lambda row: row.steps):
        rows = list(own)
        tables += [_build_gains(f"{steps:,} steps", rows, result), _build_details(rows)]
    lines = [
        f"teacher: AP {format_number(result.teacher_ap)}",
        *result.notes,
        *(f"failed: {failure}" for failure in result.failures),
        f"{result.table}  {result.trials}  {result.plot}",
    ]
    return Group(*tables, *map(build_line, lines))


def _build_gains(title: str, rows: Iterable[MethodRow], result: Comparison) -> Table:
    over = f"95 % over\n{result.interval_over}"
    cells = []
    for row in rows:
        if row.mean is None:
            cells.append((row.method, "not run", "", "", "", ""))
            continue
        spread = "" if row.deviation is None else f" ± {format_number(row.deviation)}"
        cells.append(
            (
                row.method,
                f"{format_number(row.mean)}{spread}",
                "-" if row.difference is None else f"{row.difference:+.1f}",
                format_interval(row.interval),
                format_number(row.seconds_per_step, 2),
                format_number(row.peak_memory_mb, 0),
            )
        )
    return build_table(title, ("method", "AP", f"to {result.baseline}", over, "s/step", "MB"), cells)


def _build_details(rows: Iterable[MethodRow]) -> Table:
    cells = [
        (
            row.method,
            " / ".join(format_number(value) for value in row.ap.values()),
            *(format_number(value) for value in (row.ap_small, row.ap_medium, row.ap_large)),
        )
        for row in rows
        if row.mean is not None
    ]
    return build_table(None, ("method", "AP by seed", "AP_S", "AP_M", "AP_L"), cells)


def format_interval(interval: tuple[float, float] | None) -> str:
    """Formats the low and high end of an interval, or a dash."""
    return "-" if interval is None else " … ".join(f"{value:+.1f}" for value in interval)
