"""Plots a comparison: each method's AP over seeds, and the teacher's AP."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdetkd_cli.compare.table import Comparison, MethodRow
from gdetkd_cli.report.figures import save_figure


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draws a panel per budget, with a bar per method's mean, a dot per seed, and a line for the teacher.

    A bracket on a bar shows the 95 % interval of the method's difference to the baseline, around its mean.

    Args:
        comparison: the table; rows without AP are left out.
    """
    rows = comparison.rows
    budgets = list(dict.fromkeys(row.steps for row in rows))
    figure = Figure(figsize=(max(4.0, 0.55 * len(rows) / len(budgets) + 2) * len(budgets), 4.0), layout="constrained")
    panels = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for panel, steps in zip(panels, budgets, strict=True):
        shown = [row for row in rows if row.steps == steps and row.mean is not None]
        places = range(len(shown))
        panel.bar(places, [row.mean or 0.0 for row in shown], color="#7aa6c2")
        for place, row in zip(places, shown, strict=True):
            panel.scatter([place] * len(row.ap), list(row.ap.values()), s=12, color="black", zorder=3)
            _draw_interval(panel, place, row)
        if comparison.teacher_ap is not None:
            panel.axhline(comparison.teacher_ap, color="#b03a2e", linestyle="--", linewidth=1, label="teacher")
            panel.legend(frameon=False)
        panel.set_xticks(list(places), [row.method for row in shown], rotation=60, ha="right")
        panel.set_title(f"{steps} steps")
        panel.set_ylabel("AP")
    if any(row.interval for row in rows):
        label = f"brackets: 95 % interval of the difference to {comparison.baseline}, over {comparison.interval_over}"
        figure.supxlabel(label, fontsize="small")
    save_figure(figure, path, dpi=120)


def _draw_interval(panel: Axes, place: int, row: MethodRow) -> None:
    """Draws the interval of a row's difference around its mean AP, if it has one."""
    if row.interval is None or row.difference is None or row.mean is None:
        return
    low, high = row.interval
    reach = [[row.difference - low], [high - row.difference]]
    panel.errorbar([place], [row.mean], yerr=reach, color="#b07a2e", capsize=4, linewidth=1, zorder=2)
