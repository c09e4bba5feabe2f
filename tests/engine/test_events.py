"""What observers are told of long work."""

from __future__ import annotations

from gdetkd_cli.engine.events import Event, ImagesDone, counting


def test_long_work_is_told_now_and_then_and_short_work_not() -> None:
    heard: list[Event] = []
    often, seldom = counting(heard.append, "evaluated", 9, every=0), counting(heard.append, "labelled", 9, every=60)
    for done in (3, 6):
        often(done)
        seldom(done)
    assert heard == [ImagesDone("evaluated", 3, 9), ImagesDone("evaluated", 6, 9)]
