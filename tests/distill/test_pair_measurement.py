"""What a report shows about a pair, measured without a training step."""

from __future__ import annotations

import copy

import pytest
import torch
from distilling import PAIRS, TinyDetector, make_distiller, terms_of, without_objects

from gdetkd_cli.distill.pair_measurement import _average, _count, measure_pair
from gdetkd_cli.structures import Batch, LevelSpec


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_measuring_changes_nothing(teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    names = terms_of(teacher, student)
    distiller = make_distiller(tiny_detector(student), tiny_detector(teacher, seed=1), names)
    before = copy.deepcopy(distiller.state_dict())

    measured = measure_pair(distiller, [tiny_batch, tiny_batch], seconds=60)

    assert (measured.images, measured.objects) == (6, 6)
    assert measured.matching is not None and measured.similarity is not None
    assert sum(measured.matching.objects) == 6
    rows = [row for row in measured.matching.weights if row]
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in rows)
    assert sum(measured.similarity.matched) == 6
    assert distiller.training
    after = distiller.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_images_without_objects(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    distiller = make_distiller(tiny_detector("fcos"), tiny_detector("faster-rcnn", seed=1), ("sgfi", "ckd"))
    measured = measure_pair(distiller, [without_objects(tiny_batch)], seconds=60)

    assert (measured.images, measured.objects, measured.matching, measured.similarity) == (3, 0, None, None)


def test_time_ends_the_measurement(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    distiller = make_distiller(tiny_detector("fcos"), tiny_detector("faster-rcnn", seed=1), ("sgfi",))
    measured = measure_pair(distiller, [tiny_batch] * 5, seconds=0)

    assert measured.images == 3
    assert measured.similarity is None  # no such term


def test_weights_are_averaged_by_level_and_by_size() -> None:
    levels = tuple(LevelSpec("", 8, (stride, stride), (0.0, 0.0), (4, 4)) for stride in (8.0, 16.0))
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    matching = _average(
        weights, torch.tensor([0, 0, 1]), torch.tensor([10.0, 32.0**2, 200.0**2]), levels, (*levels, levels[0])
    )

    assert matching.weights == [[0.75, 0.25], [0.0, 1.0], []]
    assert matching.objects == [2, 1, 0]
    assert matching.by_size == {"small": (1, [1.0, 0.0]), "medium": (1, [0.5, 0.5]), "large": (1, [0.0, 1.0])}
    assert matching.student_levels == ["stride 8", "stride 16"]


def test_cosines_are_counted_in_bins() -> None:
    similarity = _count([torch.tensor([1.0, 0.99])], [torch.tensor([-1.0, 0.01]), torch.zeros(0)])

    assert similarity.matched[-1] == 2
    assert (similarity.unmatched[0], similarity.unmatched[20]) == (1, 1)
    assert similarity.matched_mean == pytest.approx(0.995)
    assert _count([torch.zeros(1)], [torch.zeros(0)]).unmatched_mean is None
