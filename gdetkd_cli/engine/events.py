"""What a run tells its observer while it goes on. Data only; the command line decides how it looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from gdetkd_cli.evaluation.coco_metrics import CocoMetrics


@dataclass(frozen=True)
class Note:
    """Something to say once: what was copied, re-initialised, counted, chosen."""

    text: str


@dataclass(frozen=True)
class Phase:
    """A part of a longer job begins ("teacher", "student alone", "student distilled", "export")."""

    title: str


@dataclass(frozen=True)
class StepDone:
    """One log step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        loss: the total that was back-propagated.
        parts: unweighted losses by name.
        lr: learning rate.
        images_per_second: over the time since the last log step.
        eta_seconds: until the last step, evaluations not counted.
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
    """So far, ``done`` of ``total`` images went through a detector, to be ``what`` ("evaluated", "labelled")."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialDone:
    """One run of a table is finished.

    Attributes:
        title: its method, budget and seed.
        ap: COCO box AP in 0-100; None: its student detects nothing that could be counted.
        left: runs that are not finished, those at work among them.
        eta_seconds: until the last of them is; None: nothing tells it yet.
    """

    title: str
    ap: float | None
    left: int
    eta_seconds: float | None


Event = Note | Phase | StepDone | Evaluated | ImagesDone | TrialDone
Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """The observer that says nothing."""


def counting(observer: Observer, what: str, total: int, *, every: float = 10.0) -> Callable[[int], None]:
    """A callback for the images done so far; it tells an observer every so many seconds, of a short job nothing."""
    told = perf_counter()

    def tell(done: int) -> None:
        nonlocal told
        if perf_counter() - told >= every:
            told = perf_counter()
            observer(ImagesDone(what, done, total))

    return tell
