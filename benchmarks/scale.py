"""Processor time and memory of a large COCO file: reading it, and what each further loader process costs.

    python benchmarks/scale.py --images 1000000 --boxes 10000000 --processes 2

The file is made in a temporary folder; all its images are one small JPEG. A loader process is a fork, as torch's are on
Linux. It reads every record once. Its cost is the memory that it shares with no other process (USS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.split import Split

_MIB = 2**20


def write_coco(folder: Path, images: int, boxes: int) -> Path:
    """Writes annotations in pieces, so that this script needs little memory itself."""
    Image.new("RGB", (640, 480)).save(folder / "image.jpg")
    rng = random.Random(0)
    path = folder / "train.json"
    with path.open("w", encoding="utf-8") as file:
        file.write('{"categories": ' + json.dumps([{"id": n, "name": f"class {n}"} for n in range(1, 81)]))
        file.write(', "images": [')
        for n in range(images):
            file.write((", " if n else "") + f'{{"id": {n}, "file_name": "image.jpg", "width": 640, "height": 480}}')
        file.write('], "annotations": [')
        for n in range(boxes):
            x, y, w, h = rng.randrange(500), rng.randrange(400), rng.randrange(1, 140), rng.randrange(1, 80)
            file.write(
                (", " if n else "") + f'{{"id": {n}, "image_id": {n % images}, "category_id": {n % 80 + 1}, '
                f'"bbox": [{x}.5, {y}.25, {w}.5, {h}.5], "area": {w * h}, "iscrowd": 0}}'
            )
        file.write("]}")
    return path


def measure_fork(split: Split) -> float:
    """Returns the private memory, in MiB, of a fork that has read every record and path once."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        before = psutil.Process().memory_full_info().uss
        for index, record in enumerate(split.records):
            _ = record.boxes, split.read.paths[index], split.read.sizes[index]  # type: ignore[attr-defined]
        os.write(writer, str((psutil.Process().memory_full_info().uss - before) / _MIB).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = float(pipe.read())
    os.waitpid(child, 0)
    return found


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--boxes", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2, help="loader processes to measure, one after the other")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = write_coco(Path(temporary), options.images, options.boxes)
        empty = psutil.Process().memory_info().rss / _MIB
        start = time.process_time()
        split = read_coco(annotations=path, images=path.parent)
        seconds = time.process_time() - start
        start = time.process_time()
        assert sum(len(record.labels) for record in split.records) == options.boxes
        result = {
            "images": len(split),
            "boxes": options.boxes,
            "file_mb": round(path.stat().st_size / 1e6),
            "read_s": round(seconds, 1),
            "one_pass_s": round(time.process_time() - start, 1),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "kept_mib": round(psutil.Process().memory_info().rss / _MIB - empty),
            "loader_process_mib": [round(measure_fork(split)) for _ in range(options.processes)],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
