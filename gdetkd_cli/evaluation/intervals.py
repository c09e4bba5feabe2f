"""95 % intervals of a mean difference in AP, over seeds and images together or over folds.

Counts: S paired seeds, N validation images, F folds. AP is in 0-100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)  # on -1..1
_HALVINGS = 100


def interval_over_seeds_and_images(
    differences: Sequence[float], image_deviation: float, images: int
) -> tuple[float, float] | None:
    """The interval of a mean difference over both the seeds and the validation images.

    The variance of the mean is s^2 / S over seeds plus v over images. Student's t has the degrees of freedom of Welch
    and Satterthwaite: S - 1 for the first part, N - 1 for the second. A percentile bootstrap is too coarse: three
    seeds have ten distinct drawings.

    Args:
        differences: S of them, AP minus the baseline's AP of the same seed.
        image_deviation: standard deviation of their mean over drawings of the images, sqrt(v).
        images: N.

    Returns:
        Low and high; None for fewer than two seeds or images, which show no spread.
    """
    seeds = len(differences)
    if seeds < 2 or images < 2:
        return None
    of_seeds, of_images = stdev(differences) ** 2 / seeds, image_deviation**2
    total = of_seeds + of_images
    centre = mean(differences)
    if total == 0.0:
        return centre, centre
    degrees = total**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1))
    half = t_quantile(0.975, degrees) * math.sqrt(total)
    return centre - half, centre + half


def interval_over_folds(difference: float, fold_deviation: float, folds: int) -> tuple[float, float]:
    """The interval of a difference in pooled AP, from the folds of a cross-validation.

    Folds differ in validation images, training set and noise of the seeds, so the spread of their differences covers
    all three. It is approximate: the training sets of two folds overlap, so the folds are not independent, and
    no unbiased estimate of the variance exists (Bengio and Grandvalet, JMLR 2004).

    Args:
        difference: of the AP pooled over the folds, mean over seeds.
        fold_deviation: standard deviation of F differences, each of one fold, mean over seeds.
        folds: F, at least 2.
    """
    half = t_quantile(0.975, folds - 1) * fold_deviation / math.sqrt(folds)
    return difference - half, difference + half


def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's t distribution.

    Args:
        probability: from 0.5 up to, but not including, 1.
        degrees: of freedom, at least 1, possibly fractional.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0.5 <= probability < 1.0 or degrees < 1.0:
        raise ValueError(f"expected 0.5 <= probability < 1 and degrees >= 1, got {probability} and {degrees}")
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees)), which bounds the search
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _integrate(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _integrate(angle: float, degrees: float) -> float:
    """Integrates Student's t up to t = sqrt(degrees) * tan(angle), with density cos(angle)^(degrees - 1)."""
    power = degrees - 1.0
    # With many degrees of freedom all mass lies near 0, so sampling stops at a density of 1e-20.
    reach = min(angle, math.acos(1e-20 ** (1.0 / power))) if power else angle
    angles = reach / 2 * (_NODES + 1.0)
    area = reach / 2 * float(_WEIGHTS @ np.cos(angles) ** power)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * area
