"""Writes the tables of the pages in docs/benchmarks/ from the finished trials beside them.

    python benchmarks/tables.py                                       # writes them
    python benchmarks/tables.py --check                               # fails if a page is out of date
    python benchmarks/tables.py --take frcnn runs/compare-frcnn       # adds trials of `gdetkd compare` first
    python benchmarks/tables.py --take frcnn runs/x --suffix "@30"    # adds them under other method names

The comment before a table defines it: the methods at one budget, or AP by budget.

    <!-- methods of frcnn at 500: none, sgfi = SGFI alone -->
    <!-- end -->
    <!-- budgets of frcnn at 500, 2000: none, sgfi -->
    <!-- end -->

``frcnn`` means ``frcnn.csv``, copied from ``trials.csv`` of ``gdetkd compare`` (``pooled.csv`` with folds), and
``frcnn-intervals.csv``, copied from its ``table.csv``. The second has the number of validation images or folds and the
deviation of the gain over them, which its interval needs. A method without a finished trial is "not run".
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

TRIALS = Path(__file__).parents[1] / "docs" / "benchmarks"
PAGES = sorted(TRIALS.glob("*.md"))
BLOCK = re.compile(
    r"(<!-- (?P<kind>methods|budgets) of (?P<name>\S+) at (?P<steps>[\d, ]+): (?P<methods>.+?) -->\n)"
    r".*?(?P<end><!-- end -->)",
    flags=re.DOTALL,
)
_NONE, _NOT_RUN = "none", "not run"
INTERVAL_FIELDS = ("method", "steps", "image_deviation", "images", "fold_deviation", "folds")

Row = Mapping[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    parser.add_argument("--take", nargs=2, metavar=("NAME", "FOLDER"), help="add the trials of FOLDER to NAME")
    parser.add_argument("--suffix", default="", help="append this to the method names of --take")
    arguments = parser.parse_args()
    if arguments.take:
        name, folder = arguments.take
        trials = _read(Path(folder) / "pooled.csv") or _read(Path(folder) / "trials.csv")
        table = _read(Path(folder) / "table.csv")
        if not all("image_deviation" in row for row in table):
            sys.exit(f"{folder}/table.csv has intervals over images only; repeat the same `gdetkd compare`")
        if any(row.get("baseline", _NONE) != _NONE for row in table):
            sys.exit(f"{folder}/table.csv has gains over another method than {_NONE}; compare without --baseline")
        add_rows(TRIALS / f"{name}.csv", trials, tuple(trials[0]), arguments.suffix)
        add_rows(TRIALS / f"{name}-intervals.csv", table, INTERVAL_FIELDS, arguments.suffix)
    fresh = {page: render_page(page.read_text("utf-8"), TRIALS) for page in PAGES}
    stale = [page for page, text in fresh.items() if page.read_text("utf-8") != text]
    if arguments.check and stale:
        sys.exit(f"out of date: {', '.join(page.name for page in stale)}; run python benchmarks/tables.py")
    for page in stale:
        page.write_text(fresh[page], "utf-8")


def add_rows(target: Path, rows: Iterable[Row], fields: Sequence[str], suffix: str) -> None:
    """Adds rows to a file; a row with the same method, steps and seed is replaced."""
    merged = {_build_key(row): row for row in _read(target)}
    renamed = [{**row, "method": row["method"] + suffix} for row in rows]
    merged |= {_build_key(row): row for row in renamed}
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(merged.items()))


def render_page(text: str, folder: Path) -> str:
    """Returns the page with each table rebuilt from the trials in ``folder``."""
    return BLOCK.sub(lambda block: block[1] + "\n".join(_build_table(block, folder)) + "\n" + block["end"], text)


def _build_table(block: re.Match[str], folder: Path) -> list[str]:
    trials = _read(folder / f"{block['name']}.csv")
    budgets = block["steps"].split(", ")
    titles = {}
    for method in block["methods"].split(", "):
        key, _, title = (part.strip() for part in method.partition("="))
        titles[key] = title or f"`{key}`"
    if block["kind"] == "budgets":
        lines = [["AP after ... steps", *(f"{int(steps):,}" for steps in budgets)]]
        lines += [[title, *(_format_by_seed(key, trials, steps) for steps in budgets)] for key, title in titles.items()]
    else:
        intervals = _read(folder / f"{block['name']}-intervals.csv")
        covered = "folds" if any(row["folds"] for row in intervals) else "seeds and images"
        gain = f"gain over `none` (95 % over {covered})"
        columns = ("AP by seed", "mean ± std", "AP_S / AP_M / AP_L", gain, "ms/step", "MB")
        lines = [[f"{budgets[0]} steps", *columns]]
        lines += [[title, *_build_cells(key, trials, budgets[0], intervals)] for key, title in titles.items()]
    lines.insert(1, ["---"] * len(lines[0]))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _build_cells(method: str, trials: Sequence[Row], steps: str, intervals: Sequence[Row]) -> list[str]:
    own, plain = _select_trials(method, trials, steps), _select_trials(_NONE, trials, steps)
    if not own:
        return [_NOT_RUN, "", "", "", "", ""]
    ap = {seed: float(row["AP"]) for seed, row in own.items()}
    whole = f"{mean(ap.values()):.1f}" + (f" ± {stdev(ap.values()):.1f}" if len(ap) > 1 else "")
    sizes = " / ".join(_format_mean(row[size] for row in own.values()) for size in ("AP_S", "AP_M", "AP_L"))
    both = [ap[seed] - float(plain[seed]["AP"]) for seed in ap if seed in plain]
    gain = f"{mean(both):+.1f}" if method != _NONE and both else ""
    for row in intervals:
        if gain and (row["method"], row["steps"]) == (method, steps) and (interval := _compute_interval(both, row)):
            gain += f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
    seconds = _compute_median(row["seconds_per_step"] for row in own.values())
    memory = _compute_median(row["peak_memory_mb"] for row in own.values())
    costs = ["" if value is None else f"{value:.0f}" for value in (seconds and 1000 * seconds, memory)]
    return [_format_by_seed(method, trials, steps), whole, sizes, gain, *costs]


def _compute_interval(gains: Sequence[float], row: Row) -> tuple[float, float] | None:
    """Returns the 95 % interval of the mean gain; None if the row has no deviation."""
    if row["fold_deviation"]:
        return interval_over_folds(mean(gains), float(row["fold_deviation"]), int(row["folds"]))
    if row["image_deviation"]:
        return interval_over_seeds_and_images(gains, float(row["image_deviation"]), int(row["images"]))
    return None


def _format_mean(values: Iterable[str]) -> str:
    """Returns the mean of the known values, or a dash if the data have no objects of that size."""
    known = [float(value) for value in values if value]
    return f"{mean(known):.1f}" if known else "-"


def _compute_median(values: Iterable[str]) -> float | None:
    """Returns the median of the known values."""
    known = [float(value) for value in values if value]
    return median(known) if known else None


def _format_by_seed(method: str, trials: Sequence[Row], steps: str) -> str:
    """Returns AP for each seed that any method has at this budget: ``6.8 / 7.7 / 7.8``."""
    own = _select_trials(method, trials, steps)
    seeds = sorted({row["seed"] for row in trials if row["steps"] == steps})
    values = [f"{float(own[seed]['AP']):.1f}" if seed in own else _NOT_RUN for seed in seeds]
    return " / ".join(values) if own else _NOT_RUN


def _select_trials(method: str, trials: Sequence[Row], steps: str) -> dict[str, Row]:
    """Returns the trials of a method at a budget, by seed."""
    return {row["seed"]: row for row in trials if (row["method"], row["steps"]) == (method, steps)}


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _build_key(row: Row) -> tuple[int, str, int]:
    return int(row["steps"]), row["method"], int(row.get("seed") or 0)


if __name__ == "__main__":
    main()
