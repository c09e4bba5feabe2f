"""Formats what a detector found in images."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from gdetkd_cli.cli.render import build_line, build_table, format_number

if TYPE_CHECKING:
    from gdetkd_cli.commands.predict import ImageResult, PredictResult

_MOST_IMAGES = 20  # that are listed


def format_predictions(result: PredictResult) -> RenderableType:
    """Formats counts by image and class, the speed, and what was written."""
    shown = result.images[:_MOST_IMAGES]
    left = len(result.images) - len(shown)
    rows = [(name, str(count)) for name, count in result.per_class.items()]
    speed = f"{format_number(result.ms_per_image)} ms per image, {format_number(1e3 / result.ms_per_image)} images/s"
    return Group(
        *(build_line(f"{image.image}: {_describe(image)}") for image in shown),
        *([build_line(f"... and {left} more images; --json lists all")] if left else []),
        *([build_table(None, ("class", "detections"), rows)] if rows else []),
        build_line(f"images: {len(result.images)}, by {result.source} ({result.format}), {speed}"),
        *([build_line(f"left out: {len(result.unreadable)}")] if result.unreadable else []),
        *(build_line(f"wrote {path}") for path in result.written),
    )


def _describe(image: ImageResult) -> str:
    counts = Counter(found.name for found in image.detections)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
