"""A seeded, bounded mutation fuzzer: `make fuzz`.

    python tests/fuzz                                     all targets, their usual number of inputs
    python tests/fuzz --target coco --count 50
    python tests/fuzz --target coco --number 17 --keep FOLDER   one input again, with its files

An input is made from (seed, target, number) alone, so a failing one is repeated by its number.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for helpers in ("commands", "detectors"):  # child processes inherit the path
    sys.path.append(str(Path(__file__).parents[1] / helpers))

from fuzzing import FAILURES, fuzz  # noqa: E402
from targets import TARGETS  # noqa: E402


def main() -> int:
    """Fuzzes the targets, prints a table and every failing input, and returns 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--count", type=int, help="inputs per target; default: the target's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, help="run this input alone and print what became of it")
    parser.add_argument("--keep", type=Path, help="folder in which the files of the last input stay")
    parser.add_argument("--messages", action="store_true", help="print one example of each kind of refusal")
    options = parser.parse_args()
    failed, rows = 0, []
    for name in options.target or TARGETS:
        target, start = TARGETS[name], time.monotonic()
        numbers = range(options.count or target.count) if options.number is None else [options.number]
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.keep or Path(temporary)
            folder.mkdir(exist_ok=True)
            outcomes = fuzz(target, numbers, seed=options.seed, folder=folder)
        counts = Counter(outcome.kind for _, outcome in outcomes)
        row = {kind: counts[kind] for kind in ("accepted", "refused", *FAILURES)}
        rows.append({"target": name, "inputs": len(outcomes), **row, "seconds": round(time.monotonic() - start)})
        print(json.dumps(rows[-1]), flush=True)
        for number, outcome in outcomes:
            if outcome.kind in FAILURES or options.number is not None:
                failed += outcome.kind in FAILURES
                print(f"  {name} {number}: {outcome.kind}: {outcome.message}", flush=True)
        if options.messages:
            shown = {outcome.message[:60]: (number, outcome.message) for number, outcome in reversed(outcomes)}
            for number, message in shown.values():
                print(f"  {number}: {message[:300]}")
    total = {kind: sum(row[kind] for row in rows) for kind in ("inputs", "accepted", "refused", *FAILURES)}
    print(json.dumps({"target": "all", **total}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
