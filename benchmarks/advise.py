"""Writes the table of docs/guides/advise.md: the answers of ``gdetkd advise``, and what the whole runs gave.

    python benchmarks/advise.py            # writes it
    python benchmarks/advise.py --check    # fails if it is out of date

A line of PAIRS names the short runs and the whole ones. Short runs are those of ``gdetkd advise`` (added with
``python benchmarks/tables.py --take advise-NAME FOLDER``), or a table's own runs at a smaller budget.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean

from gdetkd_cli.compare.table import MethodRow
from gdetkd_cli.compare.verdict import Verdict, judge, predict
from gdetkd_cli.recipe.methods import NONE

TRIALS = Path(__file__).parents[1] / "docs" / "benchmarks"
PAGE = Path(__file__).parents[1] / "docs" / "guides" / "advise.md"
BLOCK = re.compile(r"(?<=<!-- advise -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)
HEAD = "sgfi+ckd+class_kd+box_kd+head"  # what `gdetkd` is where the head is copied


@dataclass(frozen=True)
class Pair:
    """Short and whole runs of one pair of detectors: file and steps of each."""

    title: str
    teacher: float
    short: tuple[str, int]
    whole: tuple[str, int]


NOTHING = 0.5  # AP: a smaller gain in the whole runs is none
PAIRS = (
    Pair("scenes, Faster R-CNN", 78.6, ("advise-frcnn-2000", 200), ("frcnn-long", 2000)),
    Pair("scenes, Faster R-CNN", 78.6, ("advise-frcnn-8000", 800), ("frcnn-long", 8000)),
    Pair("scenes, FCOS", 78.6, ("advise-fcos-2000", 200), ("fcos-long", 2000)),
    Pair("scenes, RetinaNet", 78.6, ("advise-retinanet-2000", 200), ("retinanet-long", 2000)),
    Pair("scenes, D-FINE", 78.6, ("advise-dfine-3000", 300), ("dfine", 3000)),
    Pair("BCCD, Faster R-CNN", 53.3, ("advise-bccd", 90), ("bccd", 900)),
    Pair("cards, FCOS", 59.9, ("advise-cards-fcos", 90), ("cards-fcos", 900)),
    Pair("cards, Faster R-CNN", 59.9, ("advise-cards-frcnn", 90), ("cards-frcnn", 900)),
    Pair("scenes, Faster R-CNN", 78.6, ("frcnn", 500), ("frcnn-long", 2000)),
    Pair("scenes, Faster R-CNN", 78.6, ("frcnn-long", 2000), ("frcnn-long", 8000)),
    Pair("scenes, FCOS", 78.6, ("fcos", 600), ("fcos-long", 2000)),
    Pair("scenes, FCOS", 78.6, ("fcos-long", 2000), ("fcos-long", 8000)),
    Pair("scenes, RetinaNet", 78.6, ("retinanet", 600), ("retinanet-long", 2000)),
    Pair("scenes, RetinaNet", 78.6, ("retinanet-long", 2000), ("retinanet-long", 8000)),
    Pair("scenes, D-FINE", 78.6, ("dfine", 1000), ("dfine", 3000)),
    Pair("BCCD, Faster R-CNN", 53.3, ("bccd", 250), ("bccd", 900)),
    Pair("BCCD, D-FINE", 53.3, ("bccd-dfine", 300), ("bccd-dfine", 900)),
)


@dataclass(frozen=True)
class Outcome:
    """A pair's answer, and the gains of its methods in the short and in the whole runs."""

    pair: Pair
    plain: float
    verdict: Verdict
    short: dict[str, float]
    whole: dict[str, float]

    def predict(self, method: str) -> float:
        """The gain of a method in the whole runs, predicted from the short ones."""
        gain, longer = self.short[method], self.pair.whole[1] / self.pair.short[1]
        return predict(self.plain, (gain, gain, gain), self.pair.teacher, longer)[0]


def main() -> None:
    before = PAGE.read_text("utf-8")
    after = BLOCK.sub(lambda _: write_block(), before)
    if "--check" not in sys.argv:
        PAGE.write_text(after, "utf-8")
    elif after != before:
        sys.exit(f"{PAGE.name} is out of date; run python benchmarks/advise.py")


def write_block() -> str:
    """Returns the table and the summary."""
    outcomes = [outcome for pair in PAIRS if (outcome := compare(pair))]
    tenth = [one for one in outcomes if one.pair.short[1] * 10 == one.pair.whole[1]]
    longer = [one for one in outcomes if one not in tenth]
    lines = [
        "| pair | steps | plain, short | best, short | answer | expected | came | best of all |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(describe(one)) + " |" for one in [*tenth, *longer]),
    ]
    for title, some in (("A tenth of the steps:", tenth), ("A quarter or a third of the steps:", longer)):
        if some:
            lines += ["", title, "", *summarize(some)]
    return "\n".join(lines) + "\n"


def compare(pair: Pair) -> Outcome | None:
    """Judges a pair's short runs by the methods that its whole runs have, too; None if there are none."""
    short, whole = read_rows(*pair.short), read_rows(*pair.whole)
    common = [row for row in short if row.method == NONE or row.method in {other.method for other in whole}]
    gains = [{row.method: row.difference for row in rows if row.difference is not None} for rows in (common, whole)]
    plain = next((row.mean for row in short if row.method == NONE), None)
    if plain is None or not gains[0]:
        return None
    return Outcome(pair, plain, judge(common, pair.teacher, pair.whole[1] / pair.short[1]), *gains)


def read_rows(name: str, steps: int) -> list[MethodRow]:
    """Reads a table's trials at one budget as rows of ``gdetkd compare``."""
    trials = [row for row in _read(f"{name}.csv") if row["steps"] == str(steps) and "@" not in row["method"]]
    deviations = {
        row["method"]: float(row["image_deviation"] or 0)
        for row in _read(f"{name}-intervals.csv")
        if row["steps"] == str(steps)
    }
    aps: dict[str, dict[int, float]] = {}
    for trial in trials:
        method = "gdetkd" if trial["method"] == HEAD else trial["method"]
        aps.setdefault(method, {})[int(trial["seed"])] = float(trial["AP"])
    rows = []
    for method, ap in aps.items():
        gains = [ap[seed] - aps[NONE][seed] for seed in ap if seed in aps.get(NONE, {})]
        rows.append(
            MethodRow(
                method=method,
                steps=steps,
                ap=ap,
                mean=mean(ap.values()),
                difference=mean(gains) if gains and method != NONE else None,
                image_deviation=deviations.get(method),
            )
        )
    return rows


def describe(one: Outcome) -> list[str]:
    """Returns the cells of a pair's line."""
    pair, verdict = one.pair, one.verdict
    seen = "-" if verdict.seen is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*verdict.seen)
    expected = "-" if verdict.expected is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*verdict.expected)
    best = max(one.whole, key=one.whole.__getitem__)
    return [
        pair.title,
        f"{pair.short[1]:,} of {pair.whole[1]:,}",
        f"{one.plain:.1f}",
        f"`{verdict.method}` {seen}",
        verdict.kind,
        expected,
        f"{one.whole[verdict.method or '']:+.1f}",
        f"`{best}` {one.whole[best]:+.1f}",
    ]


def summarize(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns how good the answers were."""
    promised = [one for one in outcomes if one.verdict.expected]
    came = [one.whole[one.verdict.method or ""] for one in promised]
    covered = [
        low <= gain <= high
        for gain, one in zip(came, promised, strict=True)
        for _, low, high in [one.verdict.expected or (0, 0, 0)]
    ]
    both = [(one.predict(name), one.whole[name]) for one in outcomes for name in one.short.keys() & one.whole.keys()]
    right = [
        (one.short[a] - one.short[b]) * (one.whole[a] - one.whole[b]) > 0
        for one in outcomes
        for a, b in combinations(sorted(one.short.keys() & one.whole.keys()), 2)
    ]
    lost = [max(one.whole[name] for name in one.short) - one.whole[one.verdict.method or ""] for one in outcomes]
    errors = [abs(gain - (one.verdict.expected or (0, 0, 0))[0]) for gain, one in zip(came, promised, strict=True)]
    return [
        f"- {len(outcomes)} answers: "
        + ", ".join(
            f"{sum(o.verdict.kind == kind for o in outcomes)} {kind}"
            for kind in dict.fromkeys(o.verdict.kind for o in outcomes)
        ),
        f"- a promised gain came (above {NOTHING} AP) in {sum(gain > NOTHING for gain in came)} of {len(came)} cases, "
        f"and was within the expected range in {sum(covered)}",
        f"- mean error of the expected gain: {mean(errors):.1f} AP",
        f"- rank correlation of predicted and final gain over {len(both)} pairs and methods: "
        f"{rank_correlation(both):.2f}",
        f"- of two methods of a pair, the better one in the short runs was also better in the whole runs "
        f"in {sum(right)} of {len(right)} cases",
        f"- AP lost by taking the best method of the short runs: {mean(lost):.1f} on average, {max(lost):.1f} at most",
    ]


def rank_correlation(both: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation of two or more pairs of numbers without ties."""
    first, second = ([sorted(values).index(value) for value in values] for values in zip(*both, strict=True))
    squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    count = len(both)
    return 1 - 6 * squares / (count * (count**2 - 1))


def _read(name: str) -> list[dict[str, str]]:
    path = TRIALS / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
