"""Progress events of long work."""

from __future__ import annotations

from gdetkd_cli.engine.events import Event, ImagesDone, report_every


def test_long_work_reports_progress_and_short_work_does_not() -> None:
    heard: list[Event] = []
    often, seldom = (
        report_every(heard.append, "evaluated", 9, every=0),
        report_every(heard.append, "labelled", 9, every=60),
    )
    for done in (3, 6):
        often(done)
        seldom(done)
    assert heard == [ImagesDone("evaluated", 3, 9), ImagesDone("evaluated", 6, 9)]
