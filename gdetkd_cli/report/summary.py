"""Sections about a run as a whole: summary, training, classes and sizes, and how to repeat it. AP is in 0-100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdetkd_cli.evaluation.bootstrap import MatchedImages, deviation_of_difference, draw_again
from gdetkd_cli.report import page
from gdetkd_cli.report.charts import Points, draw_bars, draw_lines
from gdetkd_cli.report.contents import Contents, Shown
from gdetkd_cli.report.page import Section

_COLUMNS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
_SIZES = {"AP_S": "small (below 32² pixels)", "AP_M": "medium", "AP_L": "large (above 96² pixels)"}
_DRAWINGS = 200
_MOST_IMAGES = 1000  # whose detections are matched again for an interval
_MOST_CLASSES = 40  # that a chart shows
_POINTS = 200  # per line of a chart


def write_summary(contents: Contents) -> Section:
    """Builds the table of detectors, the gain with its interval, and a comparison's table."""
    rows = []
    for one in contents.shown:
        metrics, cost = one.metrics or {}, one.cost
        parameters = cost.get("parameters")
        facts = [
            page.DASH if parameters is None else f"{parameters / 1e6:.2f} M",
            *(page.number(cost.get(name)) for name in ("size_mb", "ms_per_image")),
        ]
        rows.append([one.title, *(page.number(metrics.get(name)) for name in _COLUMNS), *facts])
    columns = ("", *_COLUMNS, "parameters", "MB", "ms/image")
    html = page.table(columns, rows) + page.paragraph(_describe_gain(contents))
    sources = "; ".join(f"{one.title}: {one.source}" for one in contents.shown if one.source)
    html += page.paragraph(f"{sources}.") if sources else ""
    teacher = contents.find("teacher")
    if teacher is not None and teacher.metrics is None:
        html += page.paragraph(
            "The teacher was not evaluated on all validation images; `gdetkd report RUN --teacher` does it."
        )
    if any(one.cost.get("ms_per_image") for one in contents.shown):
        device = contents.measured.get("device", contents.environment.get("device", "unknown"))
        html += page.paragraph(f"ms/image: median on the device {device}, one image at a time.")
    if contents.trials:
        html += page.paragraph(contents.trials)
    return Section("Summary", html + _write_methods(contents))


def _describe_gain(contents: Contents) -> str:
    """The distilled student's gain over the student alone, and what its interval covers."""
    alone, distilled = contents.find("alone"), contents.find("distilled")
    if alone is None or distilled is None:
        return "There is no gain to report: the report needs a distilled run and a run of the same student alone."
    aps = [(one.metrics or {}).get("AP") for one in (alone, distilled)]
    if aps[0] is None or aps[1] is None:
        return "There is no gain to report: one of the students has no AP."
    gain = f"The distilled student gains {aps[1] - aps[0]:+.1f} AP over the student alone"
    if contents.table:
        return f"{gain} with this seed. The table of methods has the mean over seeds and its interval."
    if len({one.role for one in contents.complete} & {"alone", "distilled"}) < 2 or contents.split is None:
        return f"{gain}. It has no interval, because detections of one of the two are missing."
    if not 2 <= len(contents.split) <= _MOST_IMAGES:
        return f"{gain}. An interval is computed for 2 to {_MOST_IMAGES:,} images only; use `gdetkd compare` for one."
    half = 1.96 * _measure_deviation(contents, alone, distilled)
    low, high = aps[1] - aps[0] - half, aps[1] - aps[0] + half
    return (
        f"{gain}; 95 % interval over the validation images {low:+.1f} to {high:+.1f} "
        f"({_DRAWINGS} drawings of the images). It does not cover the seed: another seed can change the gain by "
        "more than this. `gdetkd compare` trains several seeds, and its intervals cover both."
    )


def _measure_deviation(contents: Contents, alone: Shown, distilled: Shown) -> float:
    """The standard deviation of the gain over drawings of the images."""
    assert contents.split is not None
    records, names = contents.split.records, contents.split.class_names
    drawings = draw_again(len(records), drawings=_DRAWINGS)
    theirs, ours = (
        MatchedImages(records, names, one.detections or {}).compute_aps(drawings) for one in (alone, distilled)
    )
    return deviation_of_difference([ours], [theirs])


def _write_methods(contents: Contents) -> str:
    """The table of a comparison: every method with its gain and interval."""
    if not contents.table:
        return ""
    rows = []
    for row in contents.table:
        low, high = (_parse(row.get(name)) for name in ("low", "high"))
        difference = _parse(row.get("difference"))
        rows.append(
            [
                row["method"],
                row["steps"],
                row.get("seeds", page.DASH),
                *(page.number(_parse(row.get(name))) for name in ("mean", "ap_small", "ap_medium", "ap_large")),
                page.DASH if difference is None else f"{difference:+.1f}",
                page.DASH if low is None or high is None else f"{low:+.1f} … {high:+.1f}",
            ]
        )
    over, baseline = (
        contents.table[0].get("interval_over", "seeds and images"),
        contents.table[0].get("baseline", "none"),
    )
    columns = ("method", "steps", "seeds", "mean AP", "AP_S", "AP_M", "AP_L", f"to {baseline}", "95 % interval")
    words = f"Intervals are of the difference to {baseline} and cover {over}; a method with one seed has none."
    return page.table(columns, rows) + page.paragraph(words)


def _parse(cell: str | None) -> float | None:
    return float(cell) if cell else None


def write_training(contents: Contents) -> Section:
    """Builds the curves of AP and losses."""
    aps = {one.title: _read_aps(one) for one in contents.shown if len(_read_aps(one)[0]) > 1}
    html = ""
    if aps:
        last = "; ".join(f"{name} ends at {ys[-1]:.1f} AP" for name, (_, ys) in aps.items())
        html += page.figure(
            draw_lines({"": aps}, x="optimizer steps", y="AP", alternative=f"AP over optimizer steps: {last}"),
            "AP on the validation images during training.",
        )
        steps = sorted({step for xs, _ in aps.values() for step in xs})
        found = {name: dict(zip(xs, ys, strict=True)) for name, (xs, ys) in aps.items()}
        rows = [[f"{step:.0f}", *(page.number(own.get(step)) for own in found.values())] for step in steps]
        html += page.details("AP as a table", page.table(("step", *aps), rows))
    else:
        html += page.paragraph("AP over time: fewer than two evaluations were logged (`train.evaluate_every`).")
    html += "".join(_write_losses(one) for one in contents.shown if one.log)
    return Section("Training", html)


def _read_aps(one: Shown) -> Points:
    lines = [line for line in one.log if "evaluation" in line and line["evaluation"]["AP"] is not None]
    return [line["step"] for line in lines], [line["evaluation"]["AP"] for line in lines]


def _write_losses(one: Shown) -> str:
    """The losses of one run, as shares of their first value, since their units differ."""
    lines = [line for line in one.log if "loss" in line]
    if len(lines) < 2:
        return page.paragraph(f"Losses of the {one.title}: fewer than two log lines.")
    lines = lines[:: max(1, len(lines) // _POINTS)]
    others = {"step", "lr", "gradient_norm", "images_per_second"}
    names = [name for name in lines[0] if name not in others and not name.startswith("weight/")]
    drawn: dict[str, Points] = {}
    for name in names:
        values = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if values and values[0][1] > 0:
            drawn[name] = ([step for step, _ in values], [value / values[0][1] for _, value in values])
    rows = [[str(line["step"]), *(page.number(line.get(name), 4) for name in names)] for line in lines]
    words = f"losses of the {one.title}, each divided by its first value"
    chart = draw_lines({"": drawn}, x="optimizer steps", y="share of the first value", alternative=words, marks=False)
    caption = f"{words[0].upper()}{words[1:]}. `loss` is the total that was back-propagated; the others are unweighted."
    return page.figure(chart, caption) + page.details(
        f"Losses of the {one.title} as a table", page.table(("step", *names), rows)
    )


def write_classes(contents: Contents) -> Section:
    """Builds AP per class and per size of the objects."""
    evaluated = {one.title: one.metrics for one in contents.shown if one.metrics and "per_class" in one.metrics}
    title = "AP per class and size"
    if not evaluated:
        return Section(title, page.paragraph("No detector of this report was evaluated."))
    names = list(next(iter(evaluated.values()))["per_class"])
    by_class: dict[str, list[Any]] = {
        one: [metrics["per_class"].get(name) for name in names] for one, metrics in evaluated.items()
    }
    sizes = {one: [metrics[name] for name in _SIZES] for one, metrics in evaluated.items()}
    shown = names[:_MOST_CLASSES]
    caption = "AP per class." if shown == names else f"AP of the first {len(shown)} classes; the table has all."
    html = page.figure(draw_bars(list(_SIZES.values()), sizes, y="AP", alternative=_say(_SIZES, sizes)), "AP per size.")
    few = {one: values[: len(shown)] for one, values in by_class.items()}
    html += page.figure(draw_bars(shown, few, y="AP", alternative=f"AP per class for {', '.join(by_class)}"), caption)
    rows = [[name, *(page.number(values[place]) for values in by_class.values())] for place, name in enumerate(names)]
    rows += [[label, *(page.number(values[i]) for values in sizes.values())] for i, label in enumerate(_SIZES.values())]
    return Section(title, html + page.details("As a table", page.table(("class or size", *evaluated), rows)))


def _say(names: Mapping[str, str], values: Mapping[str, list[Any]]) -> str:
    """A chart's numbers as a sentence."""
    parts = (
        f"{one}: " + ", ".join(f"{name} {page.number(value)}" for name, value in zip(names, own, strict=True))
        for one, own in values.items()
    )
    return "; ".join(parts)


def write_origin(contents: Contents) -> Section:
    """Builds the part that repeats the run: command, environment and recipe."""
    html = page.paragraph("Run this command where the recipe's paths are valid; without paths it runs anywhere.")
    html += page.code(contents.command)
    facts = {**contents.environment, **contents.environment.get("packages", {})}
    rows = [[str(name), str(value)] for name, value in facts.items() if name != "packages"]
    html += page.table(("environment", "value"), rows, words=2) if rows else page.paragraph("No environment was kept.")
    recipe = page.details("The recipe, with every default", page.code(contents.recipe))
    return Section("Environment, recipe and command", html + (recipe if contents.recipe else ""))
