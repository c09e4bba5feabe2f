"""Writes a report: one HTML file that needs no network and no other file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from gdetkd_cli.files import write_text
from gdetkd_cli.report.accuracy import write_confusions, write_errors, write_precision
from gdetkd_cli.report.changed import write_changed
from gdetkd_cli.report.contents import Contents
from gdetkd_cli.report.page import build_page
from gdetkd_cli.report.pair import write_matching, write_pyramids, write_similarity
from gdetkd_cli.report.summary import write_classes, write_origin, write_summary, write_training

_WRITERS = (
    write_summary,
    write_training,
    write_classes,
    write_precision,
    write_confusions,
    write_errors,
    write_matching,
    write_similarity,
    write_changed,
    write_pyramids,
    write_origin,
)


def write_report(contents: Contents, path: Path) -> None:
    """Writes all sections; a section without data says why in one sentence."""
    sections = [write(contents) for write in _WRITERS]
    day = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = f"gdetkd {contents.environment.get('packages', {}).get('gdetkd', '')}, written {day}"
    if contents.split is not None:
        subtitle += f"; {len(contents.split):,} validation images of {contents.split.name}"
    write_text(path, build_page(contents.title, subtitle, sections))
