"""Charts as SVG text that follows the page's colours and can be read without colour.

matplotlib draws them. Lines differ by dashes and markers, bars by hatches, and cells carry their number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

_INK = "#010203"  # becomes currentColor, the page's text colour
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and follows the page's font
    "svg.hashsalt": "gdetkd",
    "text.parse_math": False,  # a class may be named "$"
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "hatch.color": _INK,
    "hatch.linewidth": 0.6,
} | dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK)
_COLOURS = ("#8a8f98", "#d9822b", "#2f86c9", "#3a9b6b", "#a05fb0", "#c2504f", "#7d7a2a", "#4a6fd0")
_DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("--", ":", "-", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("s", "^", "o", "D", "v", "x", "P", "*", "<", ">", "h")
_HATCHES = ("//", "..", "", "xx", "\\\\", "++")
_WIDE, _HIGH = 7.2, 3.2  # inches
_PLACES = {"teacher": 0, "student alone": 1, "distilled student": 2}  # a detector looks the same in all charts

Points = tuple[Sequence[float], Sequence[float]]


def draw_lines(
    panels: Mapping[str, Mapping[str, Points]], *, x: str, y: str, alternative: str, marks: bool = True
) -> str:
    """Draws lines, in a panel for each title.

    Args:
        panels: by title of the panel, by title of the line, its x and y.
        marks: a marker at every point; else a few on each line.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for order, (name, (xs, ys)) in enumerate(lines.items()):
                place = _PLACES.get(name, order)
                axis.plot(
                    xs,
                    ys,
                    label=name,
                    color=_COLOURS[place % len(_COLOURS)],
                    linestyle=_DASHES[place % len(_DASHES)],
                    marker=_MARKERS[place % len(_MARKERS)],
                    markersize=4,
                    markevery=1 if marks and len(xs) <= 30 else max(1, len(xs) // 8),
                    linewidth=1.6,
                )
            _label(axis, title, x, y if axis is axes[0] else "")
            axis.grid(alpha=0.15)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)

    return _render(draw, (_WIDE, _HIGH), alternative)


def draw_bars(groups: Sequence[str], bars: Mapping[str, Sequence[float | None]], *, y: str, alternative: str) -> str:
    """Draws horizontal bars in groups, each with its number; None draws no bar."""
    height = 0.8 / max(1, len(bars))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for order, (name, values) in enumerate(bars.items()):
            spots = np.arange(len(groups)) + (order - (len(bars) - 1) / 2) * height
            place = _PLACES.get(name, order)
            lengths = [value or 0.0 for value in values]
            drawn = axis.barh(
                spots,
                lengths,
                height,
                label=name,
                color=_COLOURS[place % len(_COLOURS)],
                hatch=_HATCHES[place % len(_HATCHES)],
                edgecolor=_INK,
                linewidth=0.4,
            )
            axis.bar_label(drawn, ["" if v is None else f"{v:.1f}" for v in values], padding=3, fontsize=7.5)
        axis.set_yticks(range(len(groups)), [_shorten(group) for group in groups])
        axis.invert_yaxis()
        axis.margins(x=0.12)
        _label(axis, "", y, "")
        figure.legend(loc="outside upper left", ncols=4, fontsize=8)

    return _render(draw, (_WIDE, 0.7 + max(1.0, 0.2 * (len(bars) + 0.6) * len(groups))), alternative)


def draw_heat(
    panels: Mapping[str, ArrayLike],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    alternative: str,
    digits: int = 2,
) -> str:
    """Draws matrices with the number in each cell; NaN leaves a cell empty. Cells are shaded by share of their row."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, content) in zip(axes, panels.items(), strict=True):
            _draw_cells(axis, np.asarray(content, dtype=float), digits)
            axis.set_xticks(range(len(columns)), [_shorten(one) for one in columns], rotation=40, ha="right")
            axis.set_yticks(range(len(rows)), [_shorten(one) for one in rows])
            _label(axis, title, column_title, row_title if axis is axes[0] else "")
            for spine in axis.spines.values():
                spine.set_visible(False)

    width = max(4.0, len(panels) * (1.1 + 0.42 * len(columns)))
    return _render(draw, (width, 1.5 + 0.34 * len(rows)), alternative)


def draw_histograms(edges: Sequence[float], counts: Mapping[str, Sequence[int]], *, x: str, alternative: str) -> str:
    """Draws histograms over each other, each as shares of its own sum."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for place, (name, values) in enumerate(counts.items()):
            share = np.asarray(values) / max(1, sum(values))
            colour = _COLOURS[(2, 1)[place % 2]]
            axis.stairs(share, edges, fill=True, alpha=0.35, color=colour, hatch=("", "///")[place % 2], label=name)
            axis.stairs(share, edges, color=colour, linestyle=("-", "--")[place % 2], linewidth=1.6)
        _label(axis, "", x, "share of the pairs")
        axis.legend(fontsize=8, loc="upper left")

    return _render(draw, (_WIDE, _HIGH), alternative)


def _draw_cells(axis: Axes, values: NDArray[np.float64], digits: int) -> None:
    total = np.nansum(values, axis=1, keepdims=True)
    share = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    empty = np.isnan(values).all(axis=1, keepdims=True)  # nothing is drawn in an empty row
    shaded = np.ma.array(np.nan_to_num(share), mask=np.broadcast_to(empty, share.shape))
    axis.imshow(shaded, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    size = 8 if values.shape[1] <= 12 else 5.5
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if share[row, column] > 0.55 else "black"
            axis.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=size)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9.5)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _shorten(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _render(draw: Callable[[Figure], None], size: tuple[float, float], alternative: str) -> str:
    """Draws a figure and returns its SVG element, with a text alternative."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|[A-Za-z]+)_\d+"', "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alternative)}" ', 1)
