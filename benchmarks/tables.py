"""Writes the tables of docs/benchmarks.md from the finished trials in docs/benchmarks/.

    python benchmarks/tables.py                                       # writes them
    python benchmarks/tables.py --check                               # says whether they are as written
    python benchmarks/tables.py --take frcnn runs/compare-frcnn       # adds trials of `gdetkd compare` first
    python benchmarks/tables.py --take frcnn runs/x --suffix "@30"    # their methods under other names

A table stands between two comments, of which the first says what it shows: the methods at one budget, or AP by budget.

    <!-- methods of frcnn at 500: none, sgfi = SGFI alone -->
    <!-- end -->
    <!-- budgets of frcnn at 500, 2000: none, sgfi -->
    <!-- end -->

``frcnn`` means ``frcnn.csv`` and ``frcnn-intervals.csv``: from ``trials.csv`` (with folds ``pooled.csv``) and
``table.csv`` of ``gdetkd compare``. The second holds what the interval of a gain needs beside the AP of each seed: the
deviation of the gain over validation images and their number, or over folds and theirs. What has no finished trial is
"not run".
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from gdetkd_cli.evaluation.intervals import interval_over_folds, interval_over_seeds_and_images

DOCS = Path(__file__).parents[1] / "docs"
PAGE, TRIALS = DOCS / "benchmarks.md", DOCS / "benchmarks"
_BLOCK = re.compile(
    r"(<!-- (?P<kind>methods|budgets) of (?P<name>\S+) at (?P<steps>[\d, ]+): (?P<methods>.+?) -->\n)"
    r".*?(?P<end><!-- end -->)",
    flags=re.DOTALL,
)
_NONE, _NOT_RUN = "none", "not run"
_INTERVAL = ("method", "steps", "image_deviation", "images", "fold_deviation", "folds")

Row = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not up to date")
    parser.add_argument("--take", nargs=2, metavar=("NAME", "FOLDER"), help="adds a folder's trials to NAME's")
    parser.add_argument("--suffix", default="", help="added to the names of the methods that are taken")
    arguments = parser.parse_args()
    if arguments.take:
        name, folder = arguments.take
        trials = _read(Path(folder) / "pooled.csv") or _read(Path(folder) / "trials.csv")
        table = _read(Path(folder) / "table.csv")
        if not all("image_deviation" in row for row in table):
            sys.exit(f"{folder}/table.csv has intervals over images alone: run the same `gdetkd compare` again")
        if any(row.get("baseline", _NONE) != _NONE for row in table):
            sys.exit(f"{folder}/table.csv has differences to another method than {_NONE}: compare without --baseline")
        take(TRIALS / f"{name}.csv", trials, tuple(trials[0]), arguments.suffix)
        take(TRIALS / f"{name}-intervals.csv", table, _INTERVAL, arguments.suffix)
    text = PAGE.read_text()
    fresh = rendered(text, TRIALS)
    if arguments.check:
        sys.exit(0 if fresh == text else f"{PAGE.name} is not what its trials say: run python benchmarks/tables.py")
    PAGE.write_text(fresh)


def take(kept: Path, taken: Iterable[Row], fields: Sequence[str], suffix: str) -> None:
    """Adds rows to a file; one of the same method, steps and seed is replaced."""
    rows = {_key(row): row for row in _read(kept)}
    renamed = [{**row, "method": row["method"] + suffix} for row in taken]
    rows |= {_key(row): row for row in renamed}
    with kept.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(rows.items()))


def rendered(text: str, folder: Path) -> str:
    """The page with each of its tables made anew from the trials in ``folder``."""
    return _BLOCK.sub(lambda block: block[1] + "\n".join(_table(block, folder)) + "\n" + block["end"], text)


def _table(block: re.Match[str], folder: Path) -> list[str]:
    trials = _read(folder / f"{block['name']}.csv")
    budgets = block["steps"].split(", ")
    titles = {}
    for method in block["methods"].split(", "):
        key, _, title = (part.strip() for part in method.partition("="))
        titles[key] = title or f"`{key}`"
    if block["kind"] == "budgets":
        lines = [["AP after ... steps", *(f"{int(steps):,}" for steps in budgets)]]
        lines += [[title, *(_by_seed(key, trials, steps) for steps in budgets)] for key, title in titles.items()]
    else:
        intervals = _read(folder / f"{block['name']}-intervals.csv")
        covered = "folds" if any(row["folds"] for row in intervals) else "seeds and images"
        gain = f"gain over `none` (95 % over {covered})"
        columns = ("AP by seed", "mean ± std", "AP_S / AP_M / AP_L", gain, "ms/step", "MB")
        lines = [[f"{budgets[0]} steps", *columns]]
        lines += [[title, *_facts(key, trials, budgets[0], intervals)] for key, title in titles.items()]
    lines.insert(1, ["---"] * len(lines[0]))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _facts(method: str, trials: Sequence[Row], steps: str, intervals: Sequence[Row]) -> list[str]:
    own, plain = _by(method, trials, steps), _by(_NONE, trials, steps)
    if not own:
        return [_NOT_RUN, "", "", "", "", ""]
    ap = {seed: float(row["AP"]) for seed, row in own.items()}
    whole = f"{mean(ap.values()):.1f}" + (f" ± {stdev(ap.values()):.1f}" if len(ap) > 1 else "")
    sizes = " / ".join(_mean(row[size] for row in own.values()) for size in ("AP_S", "AP_M", "AP_L"))
    both = [ap[seed] - float(plain[seed]["AP"]) for seed in ap if seed in plain]
    gain = f"{mean(both):+.1f}" if method != _NONE and both else ""
    for row in intervals:
        if gain and (row["method"], row["steps"]) == (method, steps) and (interval := _interval(both, row)):
            gain += f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
    spent, memory = (_median(row[fact] for row in own.values()) for fact in ("seconds_per_step", "peak_memory_mb"))
    told = ["" if value is None else f"{value:.0f}" for value in (spent and 1000 * spent, memory)]
    return [_by_seed(method, trials, steps), whole, sizes, gain, *told]


def _interval(gains: Sequence[float], row: Row) -> tuple[float, float] | None:
    """95 % of the mean of the gains by seed; None where too little is known."""
    if row["fold_deviation"]:
        return interval_over_folds(mean(gains), float(row["fold_deviation"]), int(row["folds"]))
    if row["image_deviation"]:
        return interval_over_seeds_and_images(gains, float(row["image_deviation"]), int(row["images"]))
    return None


def _mean(values: Iterable[str]) -> str:
    """Of those that are known; a dash where the data have no objects of that size."""
    known = [float(value) for value in values if value]
    return f"{mean(known):.1f}" if known else "-"


def _median(values: Iterable[str]) -> float | None:
    """Of those that are known."""
    known = [float(value) for value in values if value]
    return median(known) if known else None


def _by_seed(method: str, trials: Sequence[Row], steps: str) -> str:
    """``6.8 / 7.7 / 7.8``: seeds 0, 1, ... as far as any method of these trials has them at this budget."""
    own = _by(method, trials, steps)
    seeds = sorted({row["seed"] for row in trials if row["steps"] == steps})
    told = [f"{float(own[seed]['AP']):.1f}" if seed in own else _NOT_RUN for seed in seeds]
    return " / ".join(told) if own else _NOT_RUN


def _by(method: str, trials: Sequence[Row], steps: str) -> dict[str, Row]:
    """The trials of a method at a budget, by seed."""
    return {row["seed"]: row for row in trials if (row["method"], row["steps"]) == (method, steps)}


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(row: Row) -> tuple[int, str, int]:
    return int(row["steps"]), row["method"], int(row.get("seed") or 0)


if __name__ == "__main__":
    main()
