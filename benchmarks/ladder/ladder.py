"""Compares methods on one pair, Faster R-CNN to FCOS, at 128, 256 and 512 pixels (the rungs).

    python benchmarks/ladder/ladder.py --output runs/ladder --methods none,roi_imitation,sgfi,gdetkd
    python benchmarks/ladder/ladder.py --output runs/ladder --name prior0 --methods sgfi --set distill.sgfi.prior=0

A default changes only if the change helps on every rung. The assignment rules of student and teacher agree on the
lowest rung and are 1.8 octaves apart on the highest, which has COCO's geometry: 224 pixels at stride 16, RPN anchors of
8 cells, student levels P3 to P7, objects from 16 to 450 pixels. Each variant (``--name``) has its own folder; variants
share the teachers. Finished runs are never repeated.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from gdetkd_cli.detectors import catalog

HERE = Path(__file__).parent
RUNGS = (128, 256, 512)  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rungs", type=int, nargs="+", default=RUNGS, choices=RUNGS)
    parser.add_argument("--methods", default="none,roi_imitation,sgfi,gdetkd")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--name", default="default", help="name of the variant defined by --set")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    for rung in options.rungs:
        changes = ["runtime.threads=1", *options.set]
        if rung > 128:
            changes.append(f"teacher.path={train_teacher(rung, options.output)}")
        folder = options.output / f"{rung}-{options.name}"
        command = ["compare", str(HERE / f"{rung}.yaml"), "--methods", options.methods, "--seeds", str(options.seeds)]
        run([*command, "--output", str(folder), *build_set_options(changes)])
    print_table(options.output)


def train_teacher(rung: int, output: Path) -> Path:
    """Trains the rung's teacher, unless it is finished, from the shipped teacher's weights; returns its folder."""
    folder = output / f"{rung}-teacher"
    changes = ["runtime.threads=1", f"student.weights={catalog.locate('builtin:shapes-teacher')}"]
    command = ["train", "--recipe", str(HERE / f"{rung}-teacher.yaml"), "--output", str(folder), "--resume", "auto"]
    run([*command, *build_set_options(changes)])
    return folder.resolve()


def build_set_options(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "gdetkd_cli", *arguments], check=True)


def print_table(output: Path) -> None:
    """Prints the mean AP of every variant and method, with a column for each rung."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for table in sorted(output.glob("*/table.csv")):
        rung, _, name = table.parent.name.partition("-")
        for row in csv.DictReader(table.open()):
            found.setdefault((name, row["method"]), {})[int(rung)] = f"{float(row['mean']):.1f} ({row['seeds']})"
    print("| variant | method | " + " | ".join(f"{rung} pixels" for rung in RUNGS) + " |")
    print("|---|---|" + "---|" * len(RUNGS))
    for (name, method), by_rung in found.items():
        print(f"| {name} | `{method}` | " + " | ".join(by_rung.get(rung, "not run") for rung in RUNGS) + " |")
    print("Mean AP, with the number of seeds in parentheses.")


if __name__ == "__main__":
    main()
