"""Data that one process per machine reads. Two processes (gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from accelerate import Accelerator

from gdetkd_cli.assembly.sharing import read_once
from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError

IMAGES, BOXES = 2_000, 200_000
MIB = 2**20


def write_coco(root: Path) -> Path:
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 200, (BOXES, 4)).tolist()
    tables = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(IMAGES)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": i % IMAGES, "category_id": 1 + i % 2, "bbox": box, "area": 9.5, "iscrowd": i % 5 == 0}
            for i, box in enumerate(numbers)
        ],
    }
    (root / "train.json").write_text(json.dumps(tables))
    for i in range(IMAGES):
        (root / f"{i}.png").touch()
    return root / "train.json"


def describe(split: Split) -> list[object]:
    """Every tenth record and path, as JSON."""
    chosen = [(split.read.paths[i], split.records[i]) for i in range(0, len(split), 10)]  # type: ignore[attr-defined]
    return [split.name, split.class_names, len(split)] + [
        [str(path), r.image_id, r.size, r.boxes.tolist(), r.labels.tolist(), r.truth] for path, r in chosen
    ]


def read_here(path: str, output: str) -> None:
    """What each process of the test does: it reads, and states what it read, how often, and its own memory."""
    accelerator = Accelerator(cpu=True)
    calls = []

    def read() -> Split:
        calls.append(path)
        return read_coco(annotations=Path(path), images=Path(path).parent)

    before = psutil.Process().memory_full_info().uss
    try:
        split = read_once(read, accelerator)
    except DataError as error:
        found: dict[str, object] = {"error": str(error)}
    else:
        used = (psutil.Process().memory_full_info().uss - before) / MIB
        split.records[0].boxes.add_(1)  # a private copy
        found = {"split": describe(split), "used": used}
    (Path(output) / f"{accelerator.process_index}.json").write_text(json.dumps(found | {"calls": len(calls)}))
    accelerator.end_training()  # a process that exits first can otherwise abort the second


def run_two(path: Path, output: Path) -> list[dict[str, object]]:
    command = f"from test_sharing import read_here; read_here({str(path)!r}, {str(output)!r})"
    (output / "run.py").write_text(command)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(output / "run.py"),
        ],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_second_process_maps_what_the_first_one_read(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    first, second = run_two(path, tmp_path)
    expected = describe(read_coco(annotations=path, images=tmp_path))
    assert first["split"] == second["split"] == json.loads(json.dumps(expected))
    assert (first["calls"], second["calls"]) == (1, 0)
    assert isinstance(second["used"], float)
    assert second["used"] < 5  # MiB; the arrays alone have 12


def test_a_failure_ends_both(tmp_path: Path) -> None:
    first, second = run_two(tmp_path / "missing.json", tmp_path)
    assert "missing.json" in str(first["error"])
    assert second["error"] == "another process of this machine cannot read the data; its message gives the reason"


def test_one_process_reads_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        read_once(lambda: 1 // 0, Accelerator(cpu=True))
