"""Answers whether distillation will help, from short runs. AP is in 0-100.

Over a run, the share of the teacher's AP that a student has reached follows a logistic curve in the logarithm of the
steps: its logit grows by about the same amount each time the steps double, for plain and distilled students alike. The
constants come from the trials in docs/benchmarks (``python benchmarks/advise.py`` compares the answers with them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log, sqrt
from typing import Literal

from gdetkd_cli.compare.table import MethodRow
from gdetkd_cli.recipe.methods import NONE

# Standard deviation of the difference of two runs with the same seed, pooled over the benchmarks' methods and budgets.
# Where the better run has less than 20 AP, it was 0.12 to 0.15 of that AP.
SEED_DEVIATION, SEED_SHARE = 2.3, 0.2
GROWTH = 1.2  # of the logit when the logarithm of the steps grows by 1
GROWTH_SPREAD = 0.5  # between pairs and budgets
GROWTH_DIFFERENCE = 0.35  # between the distilled and the plain student of a pair
CEILING = 1.05  # highest AP of a distilled student, as a multiple of its teacher's
_LEAST = 0.1  # AP, since none has no logit
TOO_EARLY = 5.0  # AP of the best short run below which its gain says nothing
LEVEL = 2.0  # AP by which a teacher must be better than a student in a short run

Kind = Literal["gain", "no gain", "weak teacher", "too early", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        kind: ``gain``: expect one; ``no gain``: the student is level with the teacher; ``weak teacher``: the student is
            better; ``too early``: the short runs show nothing; ``unclear``: the gain may be noise.
        method: the best method of the short runs; None if none finished.
        seen: its gain over plain training in the short runs, and its 95 % interval.
        expected: the gain at the full budget, if any is expected, and the range in which it was for measured pairs.
    """

    kind: Kind
    method: str | None
    seen: tuple[float, float, float] | None
    expected: tuple[float, float, float] | None
    sentence: str


def judge(rows: Sequence[MethodRow], teacher: float | None, longer: float) -> Verdict:
    """Judges short runs of plain training and of some methods with the same steps.

    Args:
        rows: of ``gdetkd compare``, each with its gain over plain training.
        teacher: the teacher's AP on the same images; None: unknown.
        longer: the steps of the whole run, divided by those of the short ones.
    """
    plain = next((row.mean for row in rows if row.method == NONE), None)
    done = [row for row in rows if row.method != NONE and row.mean is not None and row.difference is not None]
    if plain is None or not done:
        return Verdict("unclear", None, None, None, "There is no answer: plain training or every method failed.")
    best = max(done, key=lambda row: row.mean or 0.0)
    gain = best.difference or 0.0
    of_seeds = min(SEED_DEVIATION, SEED_SHARE * (best.mean or 0.0))
    half = 1.96 * sqrt(of_seeds**2 / len(best.ap) + (best.image_deviation or 0.0) ** 2)
    seen = (gain, gain - half, gain + half)
    if teacher is not None and teacher <= plain:
        text = (
            f"The teacher is too weak: it has {teacher:.1f} AP, and plain training {plain:.1f} after these few steps. "
            "Train or choose a better teacher."
        )
        return Verdict("weak teacher", best.method, seen, None, text)
    if teacher is not None and teacher - plain < LEVEL:
        text = (
            f"Expect no gain: after these few steps the student is within {teacher - plain:.1f} AP of the teacher "
            f"({teacher:.1f}). Train or choose a better teacher, or a smaller student."
        )
        return Verdict("no gain", best.method, seen, None, text)
    shown = (
        f"in these short runs {best.method} gains {gain:+.1f} AP over plain training ({seen[1]:+.1f} to {seen[2]:+.1f})"
    )
    if (best.mean or 0.0) < TOO_EARLY:
        text = f"It is too early to answer: {shown}, and has {best.mean:.1f} AP. Repeat with a larger --share."
        return Verdict("too early", best.method, seen, None, text)
    if seen[1] <= 0:
        text = f"It is unclear whether there is a gain: {shown}. Repeat with more --seeds, or a larger --share."
        return Verdict("unclear", best.method, seen, None, text)
    text = f"Expect a gain: {shown}."
    expected = None
    if teacher is not None:
        expected = predict(plain, seen, teacher, longer)
        text += " With all steps, about {:+.0f} AP ({:+.0f} to {:+.0f}).".format(*expected)
    return Verdict("gain", best.method, seen, expected, text)


def predict(
    plain: float, seen: tuple[float, float, float], teacher: float, longer: float
) -> tuple[float, float, float]:
    """Predicts the gain of a run that is ``longer`` times as long; returns it, and the ends of its range.

    Args:
        plain: AP of plain training in the short run.
        seen: gain in the short run, and the ends of its interval.
        teacher, longer: as in ``judge``.
    """
    most = CEILING * teacher

    def grow(ap: float, rate: float) -> float:
        share = min(max(ap, _LEAST) / most, 0.999)
        return most / (1 + (1 / share - 1) * exp(-rate * log(longer)))

    def gain(start: float, rate: float, difference: float) -> float:
        return grow(plain + start, rate + difference / 2) - grow(plain, rate - difference / 2)

    rates = (GROWTH - GROWTH_SPREAD, GROWTH + GROWTH_SPREAD)
    differences = (-GROWTH_DIFFERENCE, GROWTH_DIFFERENCE)
    range_ = [gain(*case) for case in product(seen[1:], rates, differences)]
    return gain(seen[0], GROWTH, 0.0), min(range_), max(range_)
