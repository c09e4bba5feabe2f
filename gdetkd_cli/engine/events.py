"""Events of a run for its observer. They hold only data; the command line renders them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter

from gdetkd_cli.evaluation.coco_metrics import CocoMetrics


@dataclass(frozen=True)
class Note:
    """A message to show once, for example what was copied or chosen."""

    text: str


@dataclass(frozen=True)
class Phase:
    """The start of a part of a longer job ("teacher", "student alone", "student distilled", "export")."""

    title: str


@dataclass(frozen=True)
class StepDone:
    """One log step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        loss: the total that was back-propagated.
        parts: unweighted losses by name.
        images_per_second: over the time since the last log step.
        eta_seconds: until the last step, without evaluations.
    """

    step: int
    steps: int
    loss: float
    parts: dict[str, float]
    lr: float
    images_per_second: float
    eta_seconds: float


@dataclass(frozen=True)
class Evaluated:
    """The student was evaluated after ``step`` optimizer steps."""

    step: int
    metrics: CocoMetrics


@dataclass(frozen=True)
class ImagesDone:
    """Progress: ``done`` of ``total`` images are ``what`` ("evaluated", "labelled")."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialDone:
    """A trial of a table is finished.

    Attributes:
        title: its method, budget and seed.
        ap: COCO box AP in 0-100; None if its student was not evaluated.
        left: trials that are not finished, running ones included.
        eta_seconds: until all are finished; None if unknown.
    """

    title: str
    ap: float | None
    left: int
    eta_seconds: float | None


Event = Note | Phase | StepDone | Evaluated | ImagesDone | TrialDone
Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """An observer that ignores every event."""


def report_notes(observer: Observer, texts: Iterable[str]) -> None:
    """Reports each text as a note."""
    for text in texts:
        observer(Note(text))


def report_every(observer: Observer, what: str, total: int, *, every: float = 10.0) -> Callable[[int], None]:
    """Builds a callback for the number of images done; it reports to the observer at most ``every`` seconds."""
    last = perf_counter()

    def report(done: int) -> None:
        nonlocal last
        if perf_counter() - last >= every:
            last = perf_counter()
            observer(ImagesDone(what, done, total))

    return report
