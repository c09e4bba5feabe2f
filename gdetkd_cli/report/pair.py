"""Sections about a trained pair: matched levels (SGFI), similarity of regions (CKD), and both pyramids."""

from __future__ import annotations

import numpy as np

from gdetkd_cli.report import page
from gdetkd_cli.report.charts import draw_heat, draw_histograms
from gdetkd_cli.report.contents import Contents
from gdetkd_cli.report.page import Section

_NOT_MEASURED = "Left out, because the run was not measured after training (measured.json)."


def write_matching(contents: Contents) -> Section:
    """Builds SGFI's weights: student level by teacher level, and by size of the object."""
    title = "Which student level answers for which teacher level (SGFI)"
    pair = contents.measured.get("pair")
    if not pair:
        return Section(title, page.paragraph(_NOT_MEASURED))
    matching = pair["matching"]
    if not matching:
        return Section(title, page.paragraph("Left out, because the run has no SGFI term, or no objects to measure."))
    students = matching["student_levels"]
    empty = [float("nan")] * len(students)
    teachers = [f"{name} ({n} obj.)" for name, n in zip(matching["teacher_levels"], matching["objects"], strict=True)]
    sizes = [f"{name} ({count} obj.)" for name, (count, _) in matching["by_size"].items()]
    weights = [row or empty for row in matching["weights"]]
    by_size = [row or empty for _, row in matching["by_size"].values()]
    shared = {"columns": students, "column_title": "student level", "digits": 2}
    found = [
        f"{name}: {students[int(np.argmax(row))]}"
        for name, row in zip(matching["teacher_levels"], matching["weights"], strict=True)
        if row
    ]
    words = f"student level with the largest mean weight, by teacher level: {'; '.join(found)}"
    html = page.paragraph(
        f"Mean weights of SGFI's match over {pair['objects']} objects in {pair['images']} validation images, after the "
        "last step. Each row sums to 1. A row without objects is empty."
    )
    html += page.figure(
        draw_heat({"": weights}, rows=teachers, row_title="teacher level", alternative=words, **shared),
        f"{words[0].upper()}{words[1:]}.",
    )
    html += page.figure(
        draw_heat(
            {"": by_size}, rows=sizes, row_title="object size", alternative="mean weight by object size", **shared
        ),
        "Mean weight of each student level by object size (COCO's limits of 32 x 32 and 96 x 96 pixels).",
    )
    rows = [
        [name, *(page.number(value, 3) for value in row)]
        for name, row in zip([*teachers, *sizes], [*weights, *by_size], strict=True)
    ]
    return Section(title, html + page.details("As a table", page.table(("teacher level or size", *students), rows)))


def write_similarity(contents: Contents) -> Section:
    """Builds the histograms of cosines of matched and unmatched regions."""
    title = "Similarity of regions (CKD)"
    pair = contents.measured.get("pair")
    if not pair:
        return Section(title, page.paragraph(_NOT_MEASURED))
    similarity = pair["similarity"]
    if not similarity:
        return Section(title, page.paragraph("Left out, because the run has no CKD term, or no objects to measure."))
    counts = {"same region": similarity["matched"], "different regions": similarity["unmatched"]}
    means = [page.number(similarity[name], 2) for name in ("matched_mean", "unmatched_mean")]
    words = f"mean cosine of student and teacher: {means[0]} for the same region, {means[1]} for different regions"
    chart = draw_histograms(similarity["edges"], counts, x="cosine in CKD's common space", alternative=words)
    caption = (
        f"{words[0].upper()}{words[1:]} (true boxes; pairs that overlap are left out). The further apart the two are, "
        "the better the student's embedding tells regions apart as the teacher's does."
    )
    lows, highs = similarity["edges"][:-1], similarity["edges"][1:]
    rows = [
        [f"{low:.2f} to {high:.2f}", str(same), str(other)]
        for low, high, same, other in zip(lows, highs, *counts.values(), strict=True)
    ]
    return Section(
        title, page.figure(chart, caption) + page.details("As a table", page.table(("cosine", *counts), rows))
    )


def write_pyramids(contents: Contents) -> Section:
    """Builds the images of both pyramids."""
    title = "Both pyramids over an image"
    if not contents.pyramids:
        return Section(title, page.paragraph("Left out, because the run has no images of its pyramids (pyramids/)."))
    html = "".join(
        page.figure(
            page.image(path.read_bytes(), f"activity of each level of the {name}'s pyramid over one image"),
            f"Levels of the {name}, fine to coarse: bright cells are active.",
        )
        for name, path in contents.pyramids.items()
    )
    return Section(title, html)
