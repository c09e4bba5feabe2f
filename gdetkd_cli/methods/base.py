"""Shared by all methods: the observed pair, the interface of a term, and the pair from which terms are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gdetkd_cli.detectors.protocol import Detector, Observation, RegionView, View
from gdetkd_cli.structures import Batch, Regions


@dataclass(frozen=True)
class ObservedPair:
    """One step's outputs of both detectors.

    Attributes:
        regions: R regions.
        image_ids: (R,) the data set's id of each region's image.
        batch: the images and their ground truth.
        student_seen, teacher_seen: each detector's forward; the teacher's without gradient.
        student_view, teacher_view: each detector's outputs for the regions; the teacher's without gradient.
    """

    regions: Regions
    image_ids: Tensor
    batch: Batch
    student_seen: Observation
    teacher_seen: Observation
    student_view: RegionView
    teacher_view: RegionView


class Term(Protocol):
    """One distillation loss. Implementations are nn.Modules.

    Attributes:
        student_needs, teacher_needs: the region outputs that it reads.
    """

    student_needs: frozenset[View]
    teacher_needs: frozenset[View]

    def __call__(self, pair: ObservedPair) -> Tensor: ...


@dataclass(frozen=True)
class Detectors:
    """The pair from which terms are built.

    Attributes:
        same_space: the student has the teacher's head, so its features must equal the teacher's, not a linear map of
            them.
    """

    student: Detector
    teacher: Detector
    same_space: bool = False

    @property
    def student_channels(self) -> list[int]:
        """Channels of each student level."""
        return [level.channels for level in self.student.levels]

    @property
    def teacher_channels(self) -> list[int]:
        """Channels of each teacher level."""
        return [level.channels for level in self.teacher.levels]


def collect_needs(terms: Sequence[Term]) -> tuple[frozenset[View], frozenset[View]]:
    """The region outputs of student and teacher that any of the terms reads."""
    student: frozenset[View] = frozenset().union(*(term.student_needs for term in terms))
    teacher: frozenset[View] = frozenset().union(*(term.teacher_needs for term in terms))
    return student, teacher


def averages_regions(term: Term) -> bool:
    """Whether the loss is a mean over all regions.

    That of every term that reads outputs for regions is, unless ``averages_some`` says that it leaves out some of them.
    """
    reads_regions = bool((term.student_needs | term.teacher_needs) - {"class_maps"})
    return reads_regions and not getattr(term, "averages_some", False)
