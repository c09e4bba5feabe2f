"""Formats results as tables. Each function takes a command's result and prints nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gdetkd_cli.text import show_hidden

if TYPE_CHECKING:
    from gdetkd_cli.commands.bench import Profile
    from gdetkd_cli.commands.data import DataReport
    from gdetkd_cli.commands.demo import DemoResult
    from gdetkd_cli.commands.evaluate import EvalResult
    from gdetkd_cli.commands.export import ExportedFile, ExportResult
    from gdetkd_cli.commands.plan import CachePlan, Plan
    from gdetkd_cli.commands.report import ReportResult
    from gdetkd_cli.commands.teach import TeachResult
    from gdetkd_cli.commands.train import TrainResult
    from gdetkd_cli.commands.validate import CheckedRecipe
    from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
    from gdetkd_cli.report.pyramid import PyramidReport

_AP_ROWS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "AP_S": "objects below 32 x 32 pixels",
    "AP_M": "32 x 32 to 96 x 96 pixels",
    "AP_L": "above 96 x 96 pixels",
    "AR": "recall, 100 detections per image",
}

_MOST_PROBLEMS = 20  # of a data set that are shown

# ------------------------------------------------------------------------------------------------ numbers and lines


def format_number(value: object, digits: int = 1) -> str:
    """Formats a number with ``digits`` decimals, and anything else as a dash."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


def format_duration(seconds: float) -> str:
    """Formats seconds in their two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_metrics(metrics: CocoMetrics) -> str:
    """Formats metrics on one line."""
    values = metrics.to_json()
    return "  ".join(f"{name} {format_number(values[name])}" for name in _AP_ROWS)


def _format_millions(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.2f} M"


def build_line(text: str) -> Text:
    """A line that never wraps, so that you can copy its paths."""
    return Text(show_hidden(text), no_wrap=True, overflow="ignore")


def build_table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, words: int = 1
) -> Table:
    """A table: the first ``words`` columns are text, aligned left; the others are numbers, aligned right.

    A ``Text`` may have several lines and is shown as it is.
    """
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")  # names stay whole
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else show_hidden(cell) for cell in row))
    return table


# ---------------------------------------------------------------------------------------------------------- metrics


def _build_metrics_tables(metrics: CocoMetrics) -> Group:
    """AP by metric, then by class."""
    values = metrics.to_json()
    return Group(
        build_line(f"{metrics.images} images, {metrics.detections} detections"),
        build_table(
            None, ("metric", "over", "value"), [(k, v, format_number(values[k])) for k, v in _AP_ROWS.items()], words=2
        ),
        build_table(None, ("class", "AP"), [(name, format_number(ap)) for name, ap in metrics.per_class.items()]),
    )


def format_data(report: DataReport) -> RenderableType:
    """Formats a data set: what was recognised, counts, and the first problems."""
    fields = ", ".join(f"{name}: {_format_value(value)}" for name, value in report.data.items())
    counts = ("images", "without_objects", "boxes", "small", "medium", "large", "crowds")
    rows = [(one.split, *(str(getattr(one, name)) for name in counts)) for one in report.splits]
    names = dict.fromkeys(name for one in report.splits for name in one.per_class)
    classes = [(name, *(str(one.per_class.get(name, 0)) for one in report.splits)) for name in names]
    columns = ("class", *(f"{one.split} boxes" for one in report.splits))
    problems = report.problems[:_MOST_PROBLEMS]
    left = len(report.problems) - len(problems)
    return Group(
        build_line(f"{report.source}: data: {{{fields}}}"),
        *(build_line(f"{one.split}: {one.name}: no annotations") for one in report.splits if not one.annotated),
        build_table(None, ("split", *(name.replace("_", " ") for name in counts)), rows),
        *([build_table(None, columns, classes)] if classes else []),
        *(build_line(f"{one.split}: {note}") for one in report.splits for note in one.notes),
        *(build_line(f"{one.place}: {one.problem}") for one in problems),
        *([build_line(f"... and {left} more problems; --json lists all")] if left else []),
        build_line(f"{len(report.problems) or 'no'} problem{'' if len(report.problems) == 1 else 's'}"),
        *([build_line(f"wrote {report.sheet}")] if report.sheet else []),
    )


def _format_value(value: object) -> str:
    """Formats a value as in YAML's flow style."""
    if isinstance(value, list):
        return f"[{', '.join(map(_format_value, value))}]"
    return "null" if value is None else str(value)


def format_run(result: TrainResult) -> RenderableType:
    """Formats a finished run."""
    return Group(
        build_line(f"run {result.run}: {result.steps} steps in {format_duration(result.seconds)}"),
        _build_metrics_tables(result.metrics),
    )


def format_report(result: ReportResult) -> RenderableType:
    """Formats a written report."""
    return build_line(f"wrote {result.report} ({result.size_mb:.1f} MB): {', '.join(result.detectors)}")


def format_evaluation(result: EvalResult) -> RenderableType:
    """Formats an evaluation."""
    return Group(
        build_line(f"{result.source} ({result.format}) on {result.data}"),
        build_line(
            f"{_format_millions(result.parameters)} parameters, {format_number(result.size_mb)} MB, "
            f"{format_number(result.ms_per_image)} ms per image"
        ),
        _build_metrics_tables(result.metrics),
    )


# ----------------------------------------------------------------------------------------------------- probe and plan


def _build_levels_table(report: PyramidReport, title: str | None, *, values: bool = False) -> Table:
    """A pyramid's levels, fine to coarse; ``values`` adds their means and deviations."""
    rows: list[tuple[str | Text, ...]] = [
        (
            _wrap_name(level.name, level.module, 16 if values else 32),
            str(level.channels),
            f"{level.shape[0]} x {level.shape[1]}",
            _format_pair(level.stride),
            _format_pair(level.offset),
            *(["not finite" if value is None else f"{value:.3g}" for value in (level.mean, level.std)] * values),
        )
        for level in report.levels
    ]
    columns = ("level", "channels", "cells", "stride", "offset", *(("mean", "std") * values))
    return build_table(title, columns, rows)


def _wrap_name(name: str, module: str, width: int) -> Text:
    """Breaks a long dotted name into lines of at most ``width`` characters, where it has dots; its module follows."""
    lines = [""]
    for part in show_hidden(name).replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return Text("\n".join([*lines, *([f"({show_hidden(module)})"] if module else [])]))


def _format_pair(yx: tuple[float, float]) -> str:
    """Formats (y, x), as one number where both are equal."""
    y, x = (f"{value:.4g}" for value in yx)
    return y if y == x else f"{y}, {x}"


def _describe_detector(report: PyramidReport) -> str:
    return f"{report.source}: {report.family}, {report.format}, {_format_millions(report.parameters)} parameters"


def format_pyramid(report: PyramidReport, *, verbose: bool = False) -> RenderableType:
    """Formats a probed pyramid; strides and offsets are (y, x) pixels. ``verbose`` adds the alternatives."""
    height, width = report.size
    lines = [
        _describe_detector(report),
        f"probed with {height} x {width} pixels; called as {report.call}",
        f"classes: {', '.join(report.classes) or 'unknown'}",
    ]
    embedding = report.region_embedding
    embedding_text = ", ".join(f"{key} {value}" for key, value in embedding.items()) if embedding else "none"
    facts = [f"region embedding: {embedding_text}", f"detections: {report.detections or 'unknown format'}"]
    facts.append(f"levels: {report.reason} (confidence {report.confidence:.2f})")
    if verbose:
        facts += [f"alternative: {', '.join(other.levels)}: {other.reason}" for other in report.alternatives]
        facts += [] if report.alternatives else ["no alternative set of levels"]
    return Group(*map(build_line, lines), _build_levels_table(report, None, values=True), *map(build_line, facts))


def format_check(result: CheckedRecipe) -> RenderableType:
    """Formats a checked recipe and the next command."""
    changes = "".join(f" --set {shlex.quote(change)}" for change in result.changes)
    return Group(
        build_line(f"{result.recipe}: a {result.pair} pair"),
        *_pair_tables(result),
        build_line(f"next: gdetkd distill --recipe {result.recipe}{changes} --dry-run"),
    )


def _pair_tables(result: CheckedRecipe | Plan) -> list[RenderableType]:
    """Both detectors, their levels side by side, and the terms."""
    rows = [
        (term.name, "left out" if term.weight is None else f"{term.weight:g}", term.reason) for term in result.terms
    ]
    return [
        build_line(f"student {_describe_detector(result.student)}"),
        build_line(f"teacher {_describe_detector(result.teacher)}"),
        Columns(
            [_build_levels_table(result.student, "student"), _build_levels_table(result.teacher, "teacher")],
            padding=(0, 2),
        ),
        build_table(None, ("term", "weight", "why"), rows, words=3),
        build_line(f"head transfer: {result.head_transfer}"),
    ]


def format_taught(result: TeachResult) -> RenderableType:
    """Formats what a teacher's answers take, and how to use them."""
    kinds = "features and detections" if result.detections else "features"
    views = "as they are and mirrored" if result.views == 2 else "in one view"
    worst = max(result.errors, key=lambda name: result.errors[name])
    facts = [
        f"{result.knowledge}: {kinds} of {result.images} training images, {views}; {result.gigabytes:.3g} GB",
        f"{result.added} answers added in {format_duration(result.seconds)}",
        f"largest rounding error of a level: {result.errors[worst]:.1e} of its norm ({worst})",
        f"use it in a recipe: teacher: {{arch: knowledge, path: {result.knowledge}}}",
    ]
    return Group(*map(build_line, facts))


def _describe_cache(cache: CachePlan) -> str:
    size = f"{cache.gigabytes:.3g} GB for {cache.views} views"
    if cache.saved_per_step is None or cache.saved_seconds is None:
        return f"teacher: stored answers, {size}; it does not run"
    saved = f"{cache.saved_per_step:.2g} s per step, {format_duration(cache.saved_seconds)} in total"
    if cache.mode == "off":
        return f"teacher_cache: off; it would take {size} and save {saved}"
    return f"teacher_cache: {cache.mode}, {size}; it saves {saved}"


def format_plan(plan: Plan) -> RenderableType:
    """Formats a dry run."""
    losses = "  ".join(f"{name} {value:.3g}" for name, value in plan.losses.items())
    facts = [
        f"losses of one step, before their weights: {losses}",
        f"{plan.steps} steps of {_count(plan.batch_size, 'image')}",
        f"{plan.train_images} training images, {plan.val_images} validation images",
        f"{plan.device}, {plan.precision}, {_count(plan.threads, 'thread')}; peak memory {plan.peak_memory_mb:.0f} MB",
        f"{plan.seconds_per_step:.2f} s per step, about {format_duration(plan.estimated_seconds)} in total",
        *([_describe_cache(plan.cache)] if plan.cache else []),
    ]
    return Group(
        build_line(f"{plan.recipe}: {plan.pair}"),
        *_pair_tables(plan),
        *map(build_line, [*facts, *plan.notes]),
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def format_profile(profile: Profile) -> RenderableType:
    """Formats a profile."""
    rows = [
        (phase, format_number(seconds * 1e3), f"{format_number(100 * seconds / profile.step)} %")
        for phase, seconds in profile.seconds.items()
    ]
    return Group(
        build_table(None, ("phase", "ms", "share of a step"), rows),
        build_line(
            f"a distillation step takes {profile.step * 1e3:.1f} ms (median of {profile.steps}; "
            f"{profile.device}, {_count(profile.threads, 'thread')})"
        ),
        build_line(
            f"the teacher's features and a plain student step take {profile.floor * 1e3:.1f} ms; "
            f"a distillation step takes {profile.ratio:.2f} times as long (both without data loading)"
        ),
        build_line(
            f"{profile.images_per_second:.1f} images/s; the loader alone: {profile.loader_images_per_second:.1f} "
            f"images/s ({_format_workers(profile.workers)}); peak memory {profile.peak_memory_mb:.0f} MB"
        ),
        build_line(
            f"the recipe's {profile.recipe_steps} steps would take {format_duration(3600 * profile.recipe_hours)} "
            "without evaluations"
        ),
    )


def _format_workers(count: int) -> str:
    return "in the training process" if count == 0 else f"{count} process{'es' if count > 1 else ''}"


# --------------------------------------------------------------------------------------------------- export and demo


def format_export(result: ExportResult) -> RenderableType:
    """Formats exported files and their parity with the detector."""
    return Group(*(build_line(line) for file in result.files for line in _format_file(file)))


def _format_file(file: ExportedFile) -> Iterable[str]:
    parity = file.parity
    yield f"{file.path}  {file.format}, {format_number(file.size_mb)} MB, by {file.exporter}"
    if file.reduced:
        yield (
            f"  on {parity.images} images {parity.unmatched} boxes have no counterpart among the detector's, others "
            f"differ by up to {parity.max_box_error:.2g} pixels, scores by up to {parity.max_score_error:.2g}; measure "
            f"its AP with: gdetkd eval {file.path}"
        )
        return
    yield (
        f"  parity {'ok' if parity.passed else 'FAILED'}: {parity.detections} detections on {parity.images} images "
        f"({parity.empty} without detections), boxes within {parity.max_box_error:.2g} pixels, "
        f"scores within {parity.max_score_error:.2g}"
    )


def format_demo(result: DemoResult) -> RenderableType:
    """Formats the demo's table and verdict."""
    rows = []
    for name, row in (
        ("teacher", result.teacher),
        ("student", result.student),
        ("distilled", result.distilled),
    ):
        values = row.metrics.to_json()
        rows.append(
            (
                name,
                *(format_number(values[key]) for key in ("AP", "AP50", "AP_S", "AP_M", "AP_L")),
                _format_millions(row.parameters),
                format_number(row.size_mb),
                format_number(row.ms_per_image),
            )
        )
    columns = ("", "AP", "AP50", "AP_S", "AP_M", "AP_L", "params", "MB", "ms/image")
    return Group(
        build_table(None, columns, rows),
        build_line(f"gain from distillation: {result.gain:+.1f} AP at {result.steps} steps (seed {result.seed})"),
        build_line(f"ONNX file matches the detector: {'yes' if result.onnx_parity else 'NO'}"),
        Text(result.verdict),
        build_line(f"image {result.image}"),
        build_line(f"files {result.output}"),
        build_line(f"took {format_duration(result.seconds)}"),
    )
