"""Packs a finished run of the recipe shapes/teacher as the teacher that ships with gdetkd.

    gdetkd train --recipe shapes/teacher --output runs/shapes-teacher
    python benchmarks/pack_teacher.py runs/shapes-teacher

Weights are stored as float16 to keep the file small, and converted to float32 on loading.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gdetkd_cli.detectors.catalog import BUILTIN


def main(run: Path) -> None:
    saved = torch.load(run / "student.pt", weights_only=True)
    saved["model"] = {k: v.half() if v.is_floating_point() else v for k, v in saved["model"].items()}
    target = BUILTIN / f"{run.name}.pt"
    target.parent.mkdir(exist_ok=True)
    torch.save(saved, target)
    print(f"{target}: {target.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
