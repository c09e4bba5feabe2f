"""A picture of a comparison: each method's AP over seeds, beside the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gdetkd_cli.results import MethodRow


def draw_comparison(rows: Sequence[MethodRow], teacher: float | None, path: Path) -> None:
    """One panel for each budget: a bar for each method's mean, a dot for each seed, a line for the teacher.

    Args:
        rows: those without AP are left out.
        teacher: its AP, if known.
        path: the PNG to write.
    """
    budgets = list(dict.fromkeys(row.steps for row in rows))
    figure = Figure(figsize=(max(4.0, 0.55 * len(rows) / len(budgets) + 2) * len(budgets), 4.0), layout="constrained")
    panels = figure.subplots(1, len(budgets), squeeze=False, sharey=True)[0]
    for panel, steps in zip(panels, budgets, strict=True):
        shown = [row for row in rows if row.steps == steps and row.mean is not None]
        places = range(len(shown))
        panel.bar(places, [row.mean or 0.0 for row in shown], color="#7aa6c2")
        for place, row in zip(places, shown, strict=True):
            panel.scatter([place] * len(row.ap), list(row.ap.values()), s=12, color="black", zorder=3)
        if teacher is not None:
            panel.axhline(teacher, color="#b03a2e", linestyle="--", linewidth=1, label="teacher")
            panel.legend(frameon=False)
        panel.set_xticks(list(places), [row.method for row in shown], rotation=60, ha="right")
        panel.set_title(f"{steps} steps")
        panel.set_ylabel("AP")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
