"""The images whose detections changed most, with boxes.

Shapes: M detections of an image.
"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from gdetkd_cli.data.bad_images import BadImageError
from gdetkd_cli.evaluation.errors import Matches, match_split, read_truth
from gdetkd_cli.report import page
from gdetkd_cli.report.accuracy import find_split
from gdetkd_cli.report.contents import Contents
from gdetkd_cli.report.page import Section
from gdetkd_cli.structures import Detections
from gdetkd_cli.text import show_hidden

_MOST = 6
_PIXELS = 400  # longest side of an image
_HIT, _FALSE = "#1f9d55", "#e3342f"


def write_changed(contents: Contents) -> Section:
    """Builds rows of truth and detectors for the images that changed most."""
    title = "Images that changed most"
    split = find_split(contents)
    if isinstance(split, str):
        return Section(title, page.paragraph(split))
    order, reason = _rank_images(contents)
    html = page.paragraph(
        f"{reason} Solid green boxes are hits (IoU at least 0.5 and the right class), dashed red ones are not; each "
        "detector is read at the score with its best F1."
    )
    drawn = 0
    for index in order:
        if drawn == _MOST:
            break
        try:
            pixels = split.read(index)
        except BadImageError:
            continue
        jpeg, words = _draw_row(contents, index, pixels)
        html += page.figure(page.image(jpeg, words), f"Image id {split.records[index].image_id}. {words}.")
        drawn += 1
    return Section(title, html)


def _rank_images(contents: Contents) -> tuple[list[int], str]:
    """Indices of the images to show, the most changed first, and how they were chosen."""
    assert contents.split is not None
    found = {role: _count_hits(one, contents.min_scores[role]) for role, one in contents.matches.items()}
    if {"alone", "distilled"} <= found.keys():
        (hits, false), (hits_before, false_before) = found["distilled"], found["alone"]
        change = np.abs(hits - hits_before) + np.abs(false - false_before)
        reason = "Images where hits and false detections changed most from the student alone to the distilled student."
    else:
        role = next(one.role for one in reversed(contents.complete))
        objects = np.array([int((~read_truth(record)[2]).sum()) for record in contents.split.records])
        change = found[role][1] + objects - found[role][0]
        reason = "Without a student alone and a distilled student to compare, these are the images with most errors."
    order = np.argsort(-change, kind="stable")
    teacher = contents.find("teacher")
    known = set(teacher.detections or ()) if teacher else set()
    places = [int(place) for place in order if change[place] > 0]
    with_teacher = [place for place in places if contents.split.records[place].image_id in known]
    if len(with_teacher) >= _MOST and len(with_teacher) < len(places):
        return with_teacher, f"{reason} Only images with stored detections of the teacher were considered."
    return places, reason


def _count_hits(matches: Matches, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Hits and false detections of each image."""
    sure = matches.scores >= least
    hits = np.bincount(matches.image[sure & matches.hits], minlength=matches.images)
    return hits, np.bincount(matches.image[sure & ~matches.hits], minlength=matches.images)


def _draw_row(contents: Contents, index: int, pixels: Tensor) -> tuple[bytes, str]:
    """Draws the truth and each detector's boxes; returns a JPEG and its description."""
    split = contents.split
    assert split is not None
    record = split.records[index]
    every = max(1, max(record.size) // _PIXELS)
    pixels = pixels[:, ::every, ::every]
    shown = [one for one in contents.shown if one.detections is not None and record.image_id in one.detections]
    height = 2.6 * min(2.0, max(0.5, record.size[0] / record.size[1]))
    figure = Figure(figsize=(2.6 * (1 + len(shown)), height + 0.25), facecolor="white")
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=height / (height + 0.25), wspace=0.02)
    axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    boxes, labels, crowds = read_truth(record)
    names = split.class_names
    _draw(axes[0], pixels, "truth")
    _add_boxes(
        axes[0], boxes[~crowds] / every, [names[label - 1] for label in labels[~crowds].tolist()], "#2f86c9", "-"
    )
    parts = [f"{int((~crowds).sum())} objects"]
    for axis, one in zip(axes[1:], shown, strict=True):
        assert one.detections is not None
        own = one.detections[record.image_id]
        matches = match_split([record], len(names), {record.image_id: own})
        least = contents.min_scores.get(one.role, 0.5)
        sure = own.scores >= least
        own = Detections(own.boxes[sure], own.scores[sure], own.labels[sure])
        hits = [  # a detection is known by its score and label
            bool((matches.hits & (matches.scores == float(score)) & (matches.labels == label)).any())
            for score, label in zip(own.scores, own.labels.tolist(), strict=True)
        ]
        _draw(axis, pixels, one.title)
        for hit, colour, dash in ((True, _HIT, "-"), (False, _FALSE, "--")):
            rows = [place for place, value in enumerate(hits) if value == hit]
            titles = [f"{names[int(own.labels[row]) - 1]} {float(own.scores[row]):.2f}" for row in rows]
            _add_boxes(axis, own.boxes[rows] / every, titles, colour, dash)
        parts.append(f"{one.title}: {sum(hits)} hits, {len(hits) - sum(hits)} false")
    jpeg = io.BytesIO()
    figure.savefig(jpeg, format="jpeg", dpi=110, pil_kwargs={"quality": 80})
    return jpeg.getvalue(), "; ".join(parts)


def _draw(axis: Axes, pixels: Tensor, title: str) -> None:
    axis.imshow(pixels.permute(1, 2, 0).numpy())
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)


def _add_boxes(axis: Axes, boxes: Tensor, titles: list[str], colour: str, dash: str) -> None:
    for (x0, y0, x1, y1), title in zip(boxes.tolist(), titles, strict=True):
        axis.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=dash, linewidth=1.3)
        )
        # parse_math: a class may be named "$"
        axis.text(
            x0,
            y0,
            show_hidden(title),
            fontsize=5.5,
            color="white",
            va="bottom",
            parse_math=False,
            clip_on=True,
            bbox={"facecolor": colour, "alpha": 0.75, "pad": 0.6, "linewidth": 0},
        )
