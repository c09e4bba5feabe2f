"""Formats the tables of ``gdetkd compare`` and ``gdetkd advise``, in 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gdetkd_cli.cli.render import build_line, build_table, format_number
from gdetkd_cli.text import show_hidden

if TYPE_CHECKING:
    from gdetkd_cli.commands.advise import Advice
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


def format_advice(advice: Advice) -> RenderableType:
    """Formats the short runs, the answer, and the command that follows it."""
    rows = [row for row in advice.comparison.rows if row.steps == advice.steps]
    title = f"{advice.steps:,} of {advice.full_steps:,} steps"
    lines = [
        f"teacher: AP {format_number(advice.comparison.teacher_ap)}",
        *(f"failed: {failure}" for failure in advice.comparison.failures),
    ]
    if advice.recommended is not None and advice.verdict.kind in ("gain", "unclear"):
        lines.append(f"next: gdetkd distill {shlex.quote(str(advice.recommended))}")
    return Group(
        _build_gains(title, rows, advice.comparison),
        *map(build_line, lines[:1]),
        Text(show_hidden(advice.verdict.sentence)),
        *map(build_line, lines[1:]),
    )
