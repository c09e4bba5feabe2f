"""Results as tables for people. Each function takes a command's result and prints nothing itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from gdetkd_cli.commands.bench import Profile
    from gdetkd_cli.commands.demo import DemoResult
    from gdetkd_cli.commands.evaluate import EvalResult
    from gdetkd_cli.commands.export import ExportedFile, ExportResult
    from gdetkd_cli.commands.plan import Plan
    from gdetkd_cli.commands.train import TrainResult
    from gdetkd_cli.commands.validate import CheckedRecipe
    from gdetkd_cli.compare.table import Comparison
    from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
    from gdetkd_cli.report.pyramid import PyramidReport

_AP_ROWS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "AP_S": "objects below 32 x 32 pixels",
    "AP_M": "32 x 32 to 96 x 96 pixels",
    "AP_L": "above 96 x 96 pixels",
    "AR": "recall, 100 detections a image",
}

# ------------------------------------------------------------------------------------------------ numbers and lines


def number(value: object, digits: int = 1) -> str:
    """A number with this many decimals; a dash where there is none."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "-"


def duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def headline(metrics: CocoMetrics) -> str:
    """The metrics on one line."""
    values = metrics.to_json()
    return "  ".join(f"{name} {number(values[name])}" for name in _AP_ROWS)


def _millions(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.2f} M"


def _line(text: str) -> Text:
    """A line that is never wrapped, so that a path in it can be copied."""
    return Text(text, no_wrap=True, overflow="ignore")


def _table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> Table:
    """A table whose first ``words`` columns are text, to the left; the others are numbers, to the right."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")  # names stay whole
    for row in rows:
        table.add_row(*row)
    return table


# ---------------------------------------------------------------------------------------------------------- metrics


def _metrics(metrics: CocoMetrics) -> Group:
    """AP by kind, then AP by class."""
    values = metrics.to_json()
    return Group(
        _line(f"{metrics.images} images, {metrics.detections} detections"),
        _table(None, ("metric", "over", "value"), [(k, v, number(values[k])) for k, v in _AP_ROWS.items()], words=2),
        _table(None, ("class", "AP"), [(name, number(ap)) for name, ap in metrics.per_class.items()]),
    )


def trained(result: TrainResult) -> RenderableType:
    """A finished run."""
    return Group(
        _line(f"run {result.run}: {result.steps} steps in {duration(result.seconds)}"),
        _metrics(result.metrics),
    )


def evaluated(result: EvalResult) -> RenderableType:
    """An evaluated detector."""
    return Group(
        _line(f"{result.source} ({result.format}) on {result.data}"),
        _line(
            f"{_millions(result.parameters)} parameters, {number(result.size_mb)} MB, "
            f"{number(result.ms_per_image)} ms per image"
        ),
        _metrics(result.metrics),
    )


def compared(result: Comparison) -> RenderableType:
    """A table of methods."""
    facts = ("AP by seed", "mean", "AP_S", "AP_M", "AP_L", f"to {result.baseline}", f"95 % over {result.interval_over}")
    table = Table("method", "steps", *facts, "s/step", "MB", box=SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in result.rows:
        if row.mean is None:
            table.add_row(row.method, str(row.steps), "not run")
            continue
        spread = "" if row.deviation is None else f" ± {number(row.deviation)}"
        low_high = "-" if row.interval is None else " … ".join(f"{value:+.1f}" for value in row.interval)
        table.add_row(
            row.method,
            str(row.steps),
            " / ".join(number(value) for value in row.ap.values()),
            f"{number(row.mean)}{spread}",
            *(number(value) for value in (row.ap_small, row.ap_medium, row.ap_large)),
            "-" if row.difference is None else f"{row.difference:+.1f}",
            low_high,
            number(row.seconds_per_step, 2),
            number(row.peak_memory_mb, 0),
        )
    table.width = Console(width=500).measure(table).maximum  # not folded: its rows are read across
    teacher = f"teacher: AP {number(result.teacher_ap)}"
    lines = [*result.notes, *(f"failed: {failure}" for failure in result.failures)]
    return Group(table, _line(teacher), *map(_line, lines), _line(f"{result.table}  {result.trials}  {result.plot}"))


# ----------------------------------------------------------------------------------------------------- probe and plan


def _levels(report: PyramidReport, title: str | None, *, values: bool = False) -> Table:
    """One pyramid, fine to coarse; with the levels' ``values``."""
    rows = [
        (
            level.name,
            str(level.channels),
            f"{level.shape[0]} x {level.shape[1]}",
            _pair(level.stride),
            _pair(level.offset),
            *(["not finite" if value is None else f"{value:.3g}" for value in (level.mean, level.std)] * values),
        )
        for level in report.levels
    ]
    columns = ("level", "channels", "cells", "stride", "offset", *(("mean", "std") * values))
    return _table(title, columns, rows)


def _pair(yx: tuple[float, float]) -> str:
    """(y, x) as one number where both are the same."""
    y, x = (f"{value:.4g}" for value in yx)
    return y if y == x else f"{y}, {x}"


def _about(report: PyramidReport) -> str:
    return f"{report.source}: {report.family}, {report.format}, {_millions(report.parameters)} parameters"


def probed(report: PyramidReport, *, verbose: bool = False) -> RenderableType:
    """What probing found; strides and offsets are (y, x) pixels. ``verbose``: the runners-up as well."""
    height, width = report.size
    lines = [
        _about(report),
        f"probed with {height} x {width} pixels; called as {report.call}",
        f"classes: {', '.join(report.classes) or 'unknown'}",
    ]
    embedding = report.region_embedding
    found = ", ".join(f"{key} {value}" for key, value in embedding.items()) if embedding else "none"
    beside = [f"region embedding: {found}", f"detections: {report.detections or 'in no known form'}"]
    beside.append(f"levels: {report.reason} (confidence {report.confidence:.2f})")
    if verbose:
        beside += [f"or: {', '.join(other.levels)}: {other.reason}" for other in report.alternatives]
        beside += [] if report.alternatives else ["no other set of maps comes into question"]
    return Group(*map(_line, lines), _levels(report, None, values=True), *map(_line, beside))


def begun(result: CheckedRecipe) -> RenderableType:
    """What ``init`` found and wrote."""
    return Group(
        _line(f"{result.recipe}: a {result.pair} pair"),
        *_both(result),
        _line(f"next: gdetkd distill --recipe {result.recipe}{_set(result)} --dry-run"),
    )


def _set(result: CheckedRecipe) -> str:
    return "".join(f" --set {shlex.quote(change)}" for change in result.changes)


def _both(found: CheckedRecipe | Plan) -> list[RenderableType]:
    """Both detectors, their levels side by side, and the terms between them."""
    rows = [(term.name, "left out" if term.weight is None else f"{term.weight:g}", term.reason) for term in found.terms]
    return [
        _line(f"student {_about(found.student)}"),
        _line(f"teacher {_about(found.teacher)}"),
        Columns([_levels(found.student, "student"), _levels(found.teacher, "teacher")], padding=(0, 2)),
        _table(None, ("term", "weight", "why"), rows, words=3),
        _line(f"head transfer: {found.head_transfer}"),
    ]


def planned(plan: Plan) -> RenderableType:
    """What a distillation would do."""
    losses = "  ".join(f"{name} {value:.3g}" for name, value in plan.losses.items())
    facts = [
        f"one step's losses: {losses}",
        f"{plan.steps} steps of {plan.batch_size} images",
        f"{plan.train_images} training images, {plan.val_images} validation images",
        f"{plan.device}, {plan.precision}, {plan.threads} threads; peak memory {plan.peak_memory_mb:.0f} MB",
        f"{plan.seconds_per_step:.2f} s per step: about {duration(plan.estimated_seconds)} in all",
    ]
    return Group(
        _line(f"{plan.recipe}: {plan.pair}"),
        *_both(plan),
        *map(_line, [*facts, *plan.notes]),
    )


def profiled(profile: Profile) -> RenderableType:
    """Where a step's time goes."""
    rows = [
        (phase, number(seconds * 1e3), f"{number(100 * seconds / profile.step)} %")
        for phase, seconds in profile.seconds.items()
    ]
    return Group(
        _table(None, ("phase", "ms", "of a step"), rows),
        _line(
            f"a distillation step takes {profile.step * 1e3:.1f} ms (median of {profile.steps}; "
            f"{profile.device}, {profile.threads} threads)"
        ),
        _line(
            f"teacher features and a plain student step take {profile.floor * 1e3:.1f} ms: "
            f"distillation costs {profile.ratio:.2f} times that, data left aside"
        ),
        _line(
            f"{profile.images_per_second:.1f} images/s; the loader alone gives {profile.loader_images_per_second:.1f} "
            f"({_workers(profile.workers)}); peak memory {profile.peak_memory_mb:.0f} MB"
        ),
        _line(
            f"the recipe's {profile.recipe_steps} steps would take {duration(3600 * profile.recipe_hours)}, "
            "evaluations not counted"
        ),
    )


def _workers(count: int) -> str:
    return "in the training process" if count == 0 else f"{count} process{'es' if count > 1 else ''}"


# --------------------------------------------------------------------------------------------------- export and demo


def exported(result: ExportResult) -> RenderableType:
    """The written files, and how they compare with the detector they came from."""
    return Group(*(_line(line) for file in result.files for line in _exported_file(file)))


def _exported_file(file: ExportedFile) -> Iterable[str]:
    parity = file.parity
    yield f"{file.path}  {file.format}, {number(file.size_mb)} MB, by {file.exporter}"
    yield (
        f"  parity {'ok' if parity.passed else 'FAILED'}: {parity.detections} detections on {parity.images} images "
        f"({parity.empty} without any), boxes within {parity.max_box_error:.2g} pixels, "
        f"scores within {parity.max_score_error:.2g}"
    )


def demonstrated(result: DemoResult) -> RenderableType:
    """The demo's table and verdict."""
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
                *(number(values[key]) for key in ("AP", "AP50", "AP_S", "AP_M", "AP_L")),
                _millions(row.parameters),
                number(row.size_mb),
                number(row.ms_per_image),
            )
        )
    columns = ("", "AP", "AP50", "AP_S", "AP_M", "AP_L", "params", "MB", "ms/image")
    return Group(
        _table(None, columns, rows),
        _line(f"gain of distillation: {result.gain:+.1f} AP at {result.steps} steps (seed {result.seed})"),
        _line(f"ONNX file agrees with the detector: {'yes' if result.onnx_parity else 'NO'}"),
        Text(result.verdict),
        _line(f"image {result.image}"),
        _line(f"files {result.output}"),
        _line(f"took {duration(result.seconds)}"),
    )
