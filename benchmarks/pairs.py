"""Plain against distilled students: same recipe, seeds and steps; one CSV row per finished run.

    python benchmarks/pairs.py --recipe shapes/frcnn-frcnn --steps 400 --seeds 0 1 2 --csv runs/pairs.csv

A run that has a row is not run again, and one that was killed goes on where it was (its seconds are then those of the
last part). Every row is a whole run through ``gdetkd train`` or ``gdetkd distill``; their folders stay under
``--output``.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

FIELDS = ("recipe", "method", "set", "steps", "seed", "AP", "AP50", "AP_S", "AP_M", "AP_L", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", required=True, help="built-in recipe names or files")
    parser.add_argument("--steps", nargs="+", type=int, required=True, help="optimizer steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["plain", "distilled"], choices=["plain", "distilled"])
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides, for both methods")
    parser.add_argument("--label", default="", help="name of the overrides in the table")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    for recipe in arguments.recipe:
        for steps in arguments.steps:
            for seed in arguments.seeds:
                for method in arguments.methods:
                    run_cell(arguments, recipe, steps, seed, method)
    print(table(read(arguments.csv)))


def run_cell(arguments: argparse.Namespace, recipe: str, steps: int, seed: int, method: str) -> None:
    """Runs one cell and appends its row, unless it is there already."""
    key = {"recipe": recipe, "method": method, "set": arguments.label, "steps": str(steps), "seed": str(seed)}
    if any(all(row[k] == v for k, v in key.items()) for row in read(arguments.csv)):
        return
    name = "-".join([recipe.replace("/", "-"), method, *filter(None, [arguments.label]), str(steps), str(seed)])
    folder = arguments.output / name
    command = [sys.executable, "-m", "gdetkd_cli", "distill" if method == "distilled" else "train", "--json"]
    if (folder / "resume").exists():
        command += ["--resume", str(folder)]
    else:
        command += ["--recipe", recipe, "--output", str(folder)]
        for override in [f"train.steps={steps}", f"seed={seed}", *arguments.set]:
            command += ["--set", override]
    print("+", " ".join(command[1:]), file=sys.stderr, flush=True)
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    row = {**key, **{name: f"{found[name]:.2f}" for name in FIELDS[5:-1] if found[name] is not None}}
    row["seconds"] = f"{found['seconds']:.0f}"
    fresh = not arguments.csv.exists()
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: one line per recipe, overrides and budget; AP mean (and standard deviation) over seeds."""
    lines = [
        "| recipe | steps | plain AP, by seed | mean | distilled AP, by seed | mean | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = dict.fromkeys((row["recipe"], row["set"], int(row["steps"])) for row in rows)
    for recipe, label, steps in sorted(groups):
        cells = []
        means: dict[str, float] = {}
        for method in ("plain", "distilled"):
            found = {
                int(row["seed"]): float(row["AP"])
                for row in rows
                if (row["recipe"], row["set"], int(row["steps"]), row["method"]) == (recipe, label, steps, method)
            }
            values = [found[seed] for seed in sorted(found)]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells += [
                " / ".join(f"{v:.1f}" for v in values) or "not run",
                f"{mean(values):.1f}{spread}" if values else "",
            ]
            if values:
                means[method] = mean(values)
        gain = f"{means['distilled'] - means['plain']:+.1f}" if len(means) == 2 else "not run"
        lines.append(f"| {recipe}{f' ({label})' if label else ''} | {steps} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
