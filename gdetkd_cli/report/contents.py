"""What a report shows, as its sections read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gdetkd_cli.data.split import Split
from gdetkd_cli.evaluation.errors import Matches, find_best_score, match_split
from gdetkd_cli.structures import Detections

Role = Literal["teacher", "alone", "distilled"]
TITLES: dict[Role, str] = {"teacher": "teacher", "alone": "student alone", "distilled": "distilled student"}


@dataclass(frozen=True)
class Shown:
    """One detector of a report.

    Attributes:
        role: what it is to the others.
        source: its run, as the user names it.
        metrics: under the names of ``CocoMetrics.to_json``; None if it was not evaluated on all images.
        detections: by image id, with the split's labels; None if there are none.
        cost: ``parameters``, ``size_mb`` and ``ms_per_image``, as far as they are known.
    """

    role: Role
    source: str
    metrics: Mapping[str, Any] | None = None
    detections: Mapping[int, Detections] | None = None
    log: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return TITLES[self.role]


@dataclass(frozen=True)
class Contents:
    """All that a report shows.

    Attributes:
        shown: at most one detector of each role, in the order of ``TITLES``.
        split: the validation images that the runs could read, and their truth; None if there are none.
        without_split: why there is no split.
        table: rows of a comparison's table.csv; empty for other runs.
        trials: which trials of a comparison stand for their methods, in words.
        pyramids: images of the pyramids, by detector.
        recipe: text of the recipe.
        command: repeats the run.
    """

    title: str
    shown: tuple[Shown, ...]
    split: Split | None
    without_split: str = ""
    table: Sequence[Mapping[str, str]] = ()
    trials: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    pyramids: Mapping[str, Path] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    command: str = ""

    def find(self, role: Role) -> Shown | None:
        """Returns the detector of a role, if it is shown."""
        return next((one for one in self.shown if one.role == role), None)

    @cached_property
    def complete(self) -> tuple[Shown, ...]:
        """The detectors with detections on all images of the split."""
        if self.split is None:
            return ()
        ids = {record.image_id for record in self.split.records}
        return tuple(one for one in self.shown if one.detections and ids <= one.detections.keys())

    @cached_property
    def matches(self) -> dict[Role, Matches]:
        """The matched detections of each complete detector."""
        assert self.split is not None or not self.complete
        return {
            one.role: match_split(self.split.records, len(self.split.class_names), one.detections or {})
            for one in self.complete
            if self.split is not None
        }

    @cached_property
    def min_scores(self) -> dict[Role, float]:
        """The score with the best F1 of each complete detector."""
        return {role: find_best_score(matches) for role, matches in self.matches.items()}
