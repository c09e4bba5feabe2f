"""Multi-scale training: who keeps the size that the loader gave an image, and who resizes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdetkd_cli.assembly import apply_runtime, build_pair
from gdetkd_cli.assembly.runtime import find_image_size
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.recipe.distillation import Distill
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.structures import Batch

SETTINGS = ComputeSettings("cpu", "fp32", channels_last=False, compile=False, threads=1, workers=0)


def recipe(multi_scale: list[int] | None) -> Recipe:
    composed = {"arch": "composed", "backbone": "resnet18", "head": "fcos"}
    return Recipe.model_validate(
        {
            "name": "sizes",
            "data": {"format": "synthetic"},
            "augment": {"multi_scale": multi_scale},
            "student": composed,
            "train": {"steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("multi_scale", "teacher_size", "expected"),
    [
        ([48, 64], (64, 96), (True, True)),  # both as the loader made it
        ([48, 64], (96, 128), (True, False)),  # a teacher made for another size keeps its own
        (None, (64, 96), (False, False)),
    ],
)
def test_who_keeps_the_size_of_the_image(
    multi_scale: list[int] | None,
    teacher_size: tuple[int, int],
    expected: tuple[bool, bool],
    tiny_detector: Callable[..., Detector],
    tiny_batch: Batch,
) -> None:
    student, teacher = tiny_detector("fcos"), tiny_detector("faster-rcnn", seed=1)
    transform: Any = teacher.module.transform  # type: ignore[union-attr]
    transform.min_size, transform.max_size = (teacher_size[0],), teacher_size[1]
    pair = build_pair(Distill(), student, teacher, seed=0)
    apply_runtime(SETTINGS, recipe(multi_scale), student, pair, torch.device("cpu"))

    scales = [
        seen.pyramid.frame.scale for seen in (student.forward_train(tiny_batch), teacher.extract_features(tiny_batch))
    ]
    assert tuple(bool((scale == 1).all()) for scale in scales) == expected
    assert not teacher.module.training  # type: ignore[union-attr]
    # Inference brings every image to the detector's own size.
    student.predict(tiny_batch.images)
    assert student.extract_features(Batch(tiny_batch.images, tiny_batch.targets, tiny_batch.image_ids)).losses == {}


def test_an_ssd_keeps_its_one_size() -> None:
    """Its boxes have fixed steps, so it resizes whatever the loader gives it."""
    ssd = catalog.build({"kind": "torchvision", "name": "ssdlite320_mobilenet_v3_large"}, ("cat",))
    assert find_image_size(ssd.module) is None
