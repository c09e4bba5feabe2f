"""Progress on stderr: a bar on a terminal, one plain line per event elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import assert_never

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from gdetkd_cli.cli.render import format_duration, format_metrics, format_number
from gdetkd_cli.cli.terminal import build_console, is_first_process
from gdetkd_cli.engine.events import (
    Evaluated,
    Event,
    ImagesDone,
    Note,
    Observer,
    Phase,
    StepDone,
    TrialDone,
    silent,
)
from gdetkd_cli.text import show_hidden


@contextmanager
def narration(terminal: Console | None = None) -> Iterator[Observer]:
    """Yields this process's observer while a command runs.

    Args:
        terminal: where to print; stderr by default.
    """
    terminal = terminal or build_console(stderr=True)
    if not is_first_process():
        yield silent
    elif terminal.is_terminal:
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=terminal,
            refresh_per_second=2,
        ) as progress:
            bar = _Bar(progress)
            try:
                yield bar
            finally:
                bar.remove_images()
    else:
        yield lambda event: _print_event(terminal, event)


class _Bar:
    """Draws the steps of the current phase and counts of images as bars, and prints other events above them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._title = "training"
        self._task: TaskID | None = None
        self._images: TaskID | None = None
        self._aps: list[float] = []  # of the phase

    def __call__(self, event: Event) -> None:
        if isinstance(event, ImagesDone):
            self._draw_images(event)
            return
        self.remove_images()
        if isinstance(event, StepDone):
            self._draw(event)
            return
        _print_event(self._progress.console, event)
        if isinstance(event, Phase):
            self._title, self._task, self._aps = event.title, None, []
        elif isinstance(event, Evaluated) and event.metrics.ap is not None:
            self._aps.append(event.metrics.ap)

    def remove_images(self) -> None:
        """Removes the bar of images, whose work is done."""
        if self._images is not None:
            self._progress.remove_task(self._images)
            self._images = None

    def _draw_images(self, event: ImagesDone) -> None:
        if self._images is None:
            self._images = self._progress.add_task("", total=event.total, numbers="images")
        self._progress.update(self._images, description=event.what, total=event.total, completed=event.done)

    def _draw(self, event: StepDone) -> None:
        numbers = _format_step(event, self._aps)
        if self._task is None:
            self._task = self._progress.add_task(self._title, total=event.steps, completed=event.step, numbers=numbers)
        else:
            self._progress.update(self._task, completed=event.step, numbers=numbers)


def _print_event(terminal: Console, event: Event) -> None:
    terminal.print(show_hidden(_format_event(event), keep="\n"), soft_wrap=True)


def _format_event(event: Event) -> str:
    match event:
        case Note():
            return event.text
        case Phase():
            return f"== {event.title}"
        case StepDone():
            return f"step {event.step}/{event.steps}  {_format_step(event)}  lr {event.lr:.2g}"
        case ImagesDone():
            return f"{event.what} {event.done:,} of {event.total:,} images"
        case Evaluated():
            return f"step {event.step}: {format_metrics(event.metrics)}"
        case TrialDone():
            left = f"; {event.left} to go" if event.left else ""
            if left and event.eta_seconds is not None:
                left += f", about {format_duration(event.eta_seconds)}"
            return f"{event.title}: AP {format_number(event.ap)}{left}"
        case _:
            assert_never(event)


def _format_step(event: StepDone, aps: Sequence[float] = ()) -> str:
    """Speed, time left, the last and the best AP, and losses; a narrow terminal cuts off the losses."""
    losses = "  ".join(f"{name} {value:.3g}" for name, value in {"loss": event.loss, **event.parts}.items())
    found = f"AP {aps[-1]:.1f} (best {max(aps):.1f})  " if aps else ""
    return f"{event.images_per_second:.1f} images/s  {format_duration(event.eta_seconds)} left  {found}{losses}"
