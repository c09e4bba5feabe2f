"""Measures the images per second of the training loader: decoding, flip, resize to 800 pixels, floating point.

python benchmarks/loader.py --root PATH/TO/bccd --workers 0 1 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch

from gdetkd_cli import assembly
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.loader import load_training_batches
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.recipe.schema import CocoData

BATCH, WARMUP = 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with train.json and images (COCO)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--side", type=int, default=800, help="short side in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = assembly.build_split(CocoData(format="coco", root=options.root), "train")
    height, width = split.records[0].size
    print(f"{len(split)} images, the first of {width} x {height} pixels, resized to {options.side} (at most 1333)")
    for workers in options.workers:
        dataset = DetectionDataset(
            split=split,
            augmentation=build_augmentation(flip=0.5, photometric=False, multi_scale=[options.side], max_size=1333),
            seed=0,
            cache_mb=0,  # decodes every image each time, as for a data set larger than memory
        )
        steps = WARMUP + max(workers, 1) * options.steps
        batches = load_training_batches(dataset=dataset, batch_size=BATCH, steps=steps, seed=0, workers=workers)
        for _ in range(WARMUP):
            next(batches)
        start = perf_counter()
        images = sum(len(batch) for batch in batches)
        rate = images / (perf_counter() - start)
        print(f"{workers} loader processes: {rate:.1f} images/s" + (f", {rate / workers:.1f} each" if workers else ""))


if __name__ == "__main__":
    main()
