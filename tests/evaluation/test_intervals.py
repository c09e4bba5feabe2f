"""Intervals over seeds and images, and over folds: tables, by hand, against a slow version, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gdetkd_cli.evaluation.intervals import interval_over_folds, interval_over_seeds_and_images, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [  # as printed in tables of Student's t
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 4, 2.776),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.975, 1e6, 1.960),
        (0.95, 5, 2.015),
        (0.995, 2, 9.925),
        (0.999, 1, 318.309),
        (0.999, 1e5, 3.090),
        (0.5, 3, 0.0),
    ],
)
def test_the_t_quantile_is_that_of_tables(probability: float, degrees: float, expected: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=6e-4)


def test_the_t_quantile_of_two_degrees_has_a_closed_form() -> None:
    for p in (0.6, 0.9, 0.975, 0.9999):
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-9)


def test_degrees_that_are_not_whole_lie_between_those_that_are() -> None:
    assert t_quantile(0.975, 2) > t_quantile(0.975, 2.5) > t_quantile(0.975, 3)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 2), (1.0, 2), (0.975, 0.5)])
def test_arguments_out_of_range(probability: float, degrees: float) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.5 <= probability"):
        t_quantile(probability, degrees)


def test_an_interval_by_hand() -> None:
    """Seeds alone: mean 2, s = 1, t(2) = 4.303. Images alone: t(199) = 1.972."""
    assert interval_over_seeds_and_images([1.0, 2.0, 3.0], 0.0, 200) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert interval_over_seeds_and_images([2.0, 2.0, 2.0], 1.0, 200) == pytest.approx((0.028, 3.972), abs=1e-3)
    # Both: variance 1/3 + 1; degrees (4/3)^2 / ((1/3)^2 / 2 + 1 / 199) = 29.3; t = 2.044.
    assert interval_over_seeds_and_images([1.0, 2.0, 3.0], 1.0, 200) == pytest.approx((-0.360, 4.360), abs=1e-3)


def test_no_interval_from_one_seed_or_one_image() -> None:
    assert interval_over_seeds_and_images([3.0], 0.5, 200) is None
    assert interval_over_seeds_and_images([], 0.5, 200) is None
    assert interval_over_seeds_and_images([3.0, 4.0], 0.0, 1) is None
    assert interval_over_seeds_and_images([3.0, 3.0], 0.0, 200) == (3.0, 3.0)


def test_against_a_slow_version() -> None:
    """The t quantile of 2,000,000 draws of a normal over the root of a mean chi square."""
    differences, image_deviation, images = [1.2, -0.4, 2.9, 0.3], 0.6, 41
    parts = np.var(differences, ddof=1) / 4, image_deviation**2
    degrees = sum(parts) ** 2 / sum(part**2 / d for part, d in zip(parts, (3, 40), strict=True))
    generator = np.random.default_rng(0)
    draws = generator.normal(size=2_000_000) / np.sqrt(generator.chisquare(degrees, size=2_000_000) / degrees)
    half = float(np.quantile(np.abs(draws), 0.95)) * math.sqrt(sum(parts))
    expected = 1.0 - half, 1.0 + half
    assert interval_over_seeds_and_images(differences, image_deviation, images) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("of_seeds", [0.3, 1.0, 3.0])
def test_coverage_with_three_seeds(of_seeds: float) -> None:
    """1,000 data sets with a true difference of 2; each image and each seed adds noise."""
    generator = np.random.default_rng(0)
    truth, seeds, images, repeats, drawings = 2.0, 3, 60, 1000, 200
    covered, covered_by_images_alone = 0, 0
    for _ in range(repeats):
        by_image = generator.normal(scale=math.sqrt(images), size=images)  # their mean has a deviation of 1
        values = truth + generator.normal(scale=of_seeds, size=(seeds, 1)) + by_image
        drawn = generator.integers(images, size=(drawings, images))
        again = values.mean(axis=0)[drawn].mean(axis=1)
        interval = interval_over_seeds_and_images(list(values.mean(axis=1)), float(np.std(again, ddof=1)), images)
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
        low, high = np.quantile(again, [0.025, 0.975])
        covered_by_images_alone += low <= truth <= high
    assert 0.92 <= covered / repeats <= 0.99
    if of_seeds == 3.0:
        assert covered_by_images_alone / repeats < 0.75


def test_folds_by_hand() -> None:
    """Differences of 1, 3, 1, 3: s = 2 / sqrt(3); t(3) = 3.182; half = 3.182 * 1.1547 / 2."""
    spread = float(np.std([1.0, 3.0, 1.0, 3.0], ddof=1))
    assert interval_over_folds(1.9, spread, 4) == pytest.approx((1.9 - 1.837, 1.9 + 1.837), abs=1e-3)
