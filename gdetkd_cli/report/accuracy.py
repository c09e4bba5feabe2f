"""Sections about detections: precision over recall, confusions, and errors by type.

Shapes: K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gdetkd_cli.data.split import Split
from gdetkd_cli.evaluation.coco_metrics import compute_precision
from gdetkd_cli.evaluation.confusion import count_confusions
from gdetkd_cli.evaluation.errors import ERRORS, ErrorReport, measure_errors
from gdetkd_cli.report import page
from gdetkd_cli.report.charts import Points, draw_bars, draw_heat, draw_lines
from gdetkd_cli.report.contents import Contents
from gdetkd_cli.report.page import Section

_RECALLS = np.linspace(0, 1, 101)
_MOST_LINES = 8  # classes with a line of their own
_MOST_CLASSES = 15  # rows of a confusion matrix
_SHOWN_RECALLS = range(0, 101, 10)


def find_split(contents: Contents) -> Split | str:
    """The validation images, if detections can be compared with their truth; else the reason why not."""
    if contents.split is None:
        return f"Left out, because the validation images are not available: {contents.without_split}"
    if not contents.complete:
        return "Left out, because the run has no stored detections of all validation images (detections.npz)."
    return contents.split


def write_precision(contents: Contents) -> Section:
    """Builds precision over recall at IoU 0.5 and 0.75: the mean over classes, and each class."""
    title = "Precision and recall"
    split = find_split(contents)
    if isinstance(split, str):
        return Section(title, page.paragraph(split))
    curves = {
        one.title: compute_precision(split.records, split.class_names, one.detections or {})
        for one in contents.complete
    }
    means = {name: {iou: _average(values) for iou, values in own.items()} for name, own in curves.items()}
    panels: dict[str, dict[str, Points]] = {
        f"IoU {iou}": {name: (_RECALLS.tolist(), own[iou].tolist()) for name, own in means.items()}
        for iou in (0.5, 0.75)
    }
    area = "; ".join(f"{n}: {100 * own[0.5].mean():.1f} and {100 * own[0.75].mean():.1f}" for n, own in means.items())
    words = f"Precision over recall, mean over classes; area under the curve at IoU 0.5 and 0.75: {area}"
    html = page.figure(draw_lines(panels, x="recall", y="precision", alternative=words, marks=False), f"{words}.")
    columns = ("recall", *(f"{name}, IoU {iou}" for name in means for iou in (0.5, 0.75)))
    rows = [
        [f"{recall / 100:.1f}", *(f"{own[iou][recall]:.2f}" for own in means.values() for iou in (0.5, 0.75))]
        for recall in _SHOWN_RECALLS
    ]
    html += page.details("As a table", page.table(columns, rows))
    for name, own in curves.items():
        html += page.details(f"Each class: {name}", _write_per_class(own, split.class_names, name))
    return Section(title, html)


def _average(precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """(101,) mean of (101, K) over the classes with objects; zeros without any."""
    present = precision[:, (precision >= 0).all(axis=0)]
    return present.mean(axis=1) if present.shape[1] else np.zeros(len(precision))


def _write_per_class(curves: dict[float, NDArray[np.float64]], names: tuple[str, ...], detector: str) -> str:
    """Curves of the first classes with objects, and the area of all."""
    present = [place for place in range(len(names)) if (curves[0.5][:, place] >= 0).all()]
    few = present[:_MOST_LINES]
    panels = {
        f"IoU {iou}": {names[place]: (_RECALLS.tolist(), own[:, place].tolist()) for place in few}
        for iou, own in curves.items()
    }
    if not few:
        return page.paragraph("No class has objects.")
    words = f"precision over recall of the {detector}, per class"
    chart = draw_lines(panels, x="recall", y="precision", alternative=words, marks=False)
    rows = [[names[k], *(page.number(100 * float(own[:, k].mean())) for own in curves.values())] for k in present]
    note = "" if few == present else f" The chart shows the first {len(few)} classes."
    return page.figure(chart, f"P{words[1:]}.{note}") + page.table(("class", "area at IoU 0.5", "at IoU 0.75"), rows)


def write_confusions(contents: Contents) -> Section:
    """Builds a confusion matrix of each detector."""
    title = "Confusion matrix"
    split = find_split(contents)
    if isinstance(split, str):
        return Section(title, page.paragraph(split))
    classes = len(split.class_names)
    html = page.paragraph(
        "Rows are true classes, columns are found classes. An object and a detection of any class are paired at IoU "
        "0.5. The last column counts objects that are not found, the last row detections without an object. Each "
        "detector is read at the score with its best F1, since scores of different detectors mean different things."
    )
    for one in contents.complete:
        least = contents.min_scores[one.role]
        counts = count_confusions(split.records, classes, one.detections or {}, min_score=least)
        counts, names = _merge_rare(counts, split.class_names)
        right = int(np.trace(counts[:-1, :-1]))
        words = (
            f"{one.title}, score at least {least:.2f}: of {int(counts[:-1].sum())} objects, {right} are found with "
            f"their class, {int(counts[:-1, :-1].sum()) - right} with another, {int(counts[:-1, -1].sum())} not; "
            f"{int(counts[-1].sum())} detections have no object"
        )
        chart = draw_heat(
            {"": np.where(counts > 0, counts, np.nan)},
            rows=names,
            columns=names,
            row_title="true class",
            column_title="found class",
            alternative=words,
            digits=0,
        )
        rows = [[name, *map(str, row)] for name, row in zip(names, counts.tolist(), strict=True)]
        html += page.figure(chart, f"{words[0].upper()}{words[1:]}.")
        html += page.details("As a table", page.table(("true \\ found", *names), rows))
    return Section(title, html)


def _merge_rare(counts: NDArray[np.int64], names: tuple[str, ...]) -> tuple[NDArray[np.int64], list[str]]:
    """Joins all but the classes with the most objects into one, so that the matrix stays readable."""
    if len(names) <= _MOST_CLASSES:
        return counts, [*names, "background"]
    kept = np.sort(np.argsort(-counts[:-1].sum(axis=1), kind="stable")[: _MOST_CLASSES - 1])
    group = np.full(len(names) + 1, len(kept))
    group[kept], group[-1] = np.arange(len(kept)), len(kept) + 1
    merged = np.zeros((len(kept) + 2, len(kept) + 2), dtype=np.int64)
    np.add.at(merged, (group[:, None], group[None, :]), counts)
    return merged, [*(names[place] for place in kept), "other classes", "background"]


def write_errors(contents: Contents) -> Section:
    """Builds the errors by type, before and after distillation."""
    title = "Errors by type"
    split = find_split(contents)
    if isinstance(split, str):
        return Section(title, page.paragraph(split))
    reports = {one.title: measure_errors(contents.matches[one.role]) for one in contents.complete}
    costs = {name: [report.costs[kind] for kind in ERRORS] for name, report in reports.items()}
    words = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {report.costs[kind]:.1f}" for kind in ERRORS)
        for name, report in reports.items()
    )
    html = page.paragraph(
        "dAP as TIDE defines it (ECCV 2020): by how much AP50 would rise if all errors of one type, and no others, "
        "were repaired. Class: right place (IoU at least 0.5), wrong class. Location: right class, IoU 0.1 to 0.5. "
        "Duplicate: of an object that is found already. Background: IoU with every object at most 0.1. Missed: an "
        "object that no other error explains. The types do not add up to 100 - AP50."
    )
    html += page.figure(draw_bars(ERRORS, costs, y="dAP (AP50 lost to this type)", alternative=words), f"dAP: {words}.")
    return Section(title, html + page.details("dAP and counts as a table", _write_error_table(reports)))


def _write_error_table(reports: dict[str, ErrorReport]) -> str:
    columns = ["error", *(f"{name}: {what}" for name in reports for what in ("dAP", "count"))]
    rows = [
        [kind, *(v for one in reports.values() for v in (f"{one.costs[kind]:.2f}", str(one.counts[kind])))]
        for kind in ERRORS
    ]
    least = ", ".join(f"{name} {report.min_score:.2f}" for name, report in reports.items())
    words = f"Counts are at the score with the best F1 ({least}); there, missed counts every object without a hit."
    return page.table(columns, rows) + page.paragraph(words)
