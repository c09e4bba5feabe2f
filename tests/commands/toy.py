"""A distillation small enough for a test: 64-pixel scenes, two tiny Faster R-CNNs, a few steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from PIL import Image

from gdetkd_cli.assembly import build_detector
from gdetkd_cli.data.synthetic import CLASS_NAMES, draw_split
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.recipe.schema import ComposedDetector, Recipe

SMALL = {
    "representation_size": 32,
    "anchor_sizes": [[8], [16], [24], [32], [48]],
    "rpn_pre_nms_top_n_train": 40,
    "rpn_post_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_test": 40,
    "box_batch_size_per_image": 16,
}


def detector(head: str = "faster-rcnn", width: int = 8) -> dict[str, Any]:
    """A composed detector's block."""
    return {
        "arch": "composed",
        "backbone": "resnet18",
        "width": width,
        "blocks": [1, 1, 1, 1],
        "head": head,
        "pyramid_channels": 16,
        "pyramid_levels": [2, 6] if head.endswith("rcnn") else [2, 5],
        "image_size": [64, 64],
        "arguments": SMALL if head.endswith("rcnn") else {},
    }


_FOLDER = tempfile.TemporaryDirectory()


@cache
def _teacher_weights(head: str) -> str:
    """A file of a teacher's weights: a teacher without any is refused."""
    built = build_detector(ComposedDetector.model_validate(detector(head, width=12)), CLASS_NAMES, seed=0)
    path = Path(_FOLDER.name) / f"{head}.pt"
    torch.save(built.detector.module.state_dict(), path)
    return str(path)


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Images of the built-in scenes, 64 pixels wide, into files of these names; no annotations."""
    split = draw_split(split="train", images=len(names), size=64, seed=0)
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split.read(i).permute(1, 2, 0).numpy()).save(path)


def write_coco(root: Path, names: Sequence[str], train: Sequence[int], *, objects: bool = True) -> None:
    """Images as of ``write_images``; those in ``train`` are for training, the others not; one object in each."""
    write_images(root / "images", names)
    for split in ("train", "val"):
        chosen = [i for i in range(len(names)) if (i in train) == (split == "train")]
        tables = {
            "images": [{"id": i, "file_name": names[i], "width": 64, "height": 64} for i in chosen],
            "categories": [{"id": k, "name": name} for k, name in enumerate(CLASS_NAMES, start=1)],
            "annotations": [{"image_id": i, "category_id": 1, "bbox": [9, 9, 30, 30]} for i in chosen if objects],
        }
        (root / f"{split}.json").write_text(json.dumps(tables))


def recipe(*, steps: int = 6, student: str = "faster-rcnn", teacher: str = "faster-rcnn", **train: Any) -> Recipe:
    """A distillation recipe; ``train`` overrides fields of its train block."""
    return Recipe.model_validate(
        {
            "name": "toy",
            "data": {"format": "synthetic", "train_images": 10, "val_images": 4, "size": 64},
            "student": detector(student),
            "teacher": detector(teacher, width=12) | {"weights": _teacher_weights(teacher)},
            "distill": {"regions": {"per_image": 8}, "ckd": {"queue": 40}},
            "train": {"steps": steps, "batch_size": 2, "log_every": 1, "checkpoint_every": 3, **train},
            "runtime": {"threads": 1, "workers": 0, "device": "cpu"},
        }
    )


def read_losses(run: Path) -> list[dict[str, float]]:
    """The losses of each step of a run, by name."""
    left_out = ("step", "lr", "images_per_second", "gradient_norm")
    return [
        {name: value for name, value in line.items() if name not in left_out}
        for line in RunFolder(run).read_log()
        if "evaluation" not in line
    ]


def assert_same_training(live: Path, stored: Path) -> None:
    """Two runs whose teachers differ by rounding: equal losses at the first step, equal students after it.

    The candidates of an untrained head have nearly equal scores, so a rounded gradient changes which are chosen: from
    the third step on, the losses of single steps are not comparable (fcos to retinanet: up to 22 % apart), their mean
    over the run is.
    """
    before, now = read_losses(live), read_losses(stored)
    assert len(before) == len(now)
    assert now[0] == pytest.approx(before[0], rel=1e-3, abs=1e-5)
    own = [name for name in before[0] if "/" not in name and name != "loss" and f"weight/{name}" not in before[0]]
    assert own
    for name in own:
        assert now[1][name] == pytest.approx(before[1][name], rel=1e-3, abs=1e-5)
    assert fmean(each["loss"] for each in now) == pytest.approx(fmean(each["loss"] for each in before), rel=0.05)
