"""Counts what a reader changed, dropped or noticed, and lists each place on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gdetkd_cli.data.split import DataProblem


@dataclass(frozen=True)
class Remark:
    """A kind of remark.

    Attributes:
        text: of the note, with ``{n}`` for the count and ``{s}`` for the plural's s.
        drops: whether an annotation with this remark is left out because it is faulty.
        names_place: whether the note names the first place.
    """

    text: str
    drops: bool = False
    names_place: bool = False


class Tally:
    """The remarks of one reader about one split.

    Args:
        problems: receives each problem with its place; None: problems are only counted.
    """

    def __init__(self, problems: list[DataProblem] | None = None) -> None:
        self._problems = problems
        self._counts: Counter[Remark] = Counter()
        self._first: dict[Remark, str] = {}

    def add(self, remark: Remark, count: int = 1) -> None:
        """Counts what is no problem."""
        self._counts[remark] += count

    def add_problem(self, remark: Remark, describe_place: Callable[[], str]) -> None:
        """Counts a problem in one place, for example ``labels/a.txt:3``."""
        self._counts[remark] += 1
        if self._problems is not None:
            text = remark.text.format(n="", s="").strip(" .")
            self._problems.append(DataProblem(place=describe_place(), problem=text))
        if remark.names_place and remark not in self._first:
            self._first[remark] = describe_place()

    def count_dropped(self, *, before: Sequence[Remark] = ()) -> int:
        """Returns the number of dropped annotations, without those that have one of the remarks in ``before``."""
        return sum(count for remark, count in self._counts.items() if remark.drops and remark not in before)

    def format_notes(self, order: Sequence[Remark]) -> list[str]:
        """Returns the notes, those in ``order`` last."""
        notes = []
        for remark in (*(each for each in self._counts if each not in order), *order):
            count = self._counts[remark]
            text = remark.text.format(n=count, s="" if count == 1 else "s")
            if remark in self._first:
                text = f"{text.removesuffix('.')} ({self._first[remark]}{' first' if count > 1 else ''})."
            if count:
                notes.append(text)
        return notes
