"""A recipe's detector block becomes the detector that torchvision itself would build."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torchvision.models import WeightsEnum, detection
from torchvision.ops.misc import FrozenBatchNorm2d

from gdetkd_cli.assembly import build_detector, detector
from gdetkd_cli.detectors.weights import list_torchvision_categories
from gdetkd_cli.recipe.schema import TorchvisionDetector


def frozen_eps(module: nn.Module) -> list[float]:
    return [child.eps for child in module.modules() if isinstance(child, FrozenBatchNorm2d)]


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn",
        "fcos_resnet50_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn",
    ],
)
def test_frozen_norms_are_those_of_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes the epsilon out for weights that were trained without one."""

    def no_file(self: WeightsEnum, *_: Any, **__: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", no_file)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    # The file's tensors do not matter here: an empty state is one without counts of batches, and fits.
    monkeypatch.setattr(detector, "read_torchvision_weights", lambda *_: {})
    monkeypatch.setattr(detector, "load_state", lambda *_: [])
    monkeypatch.setattr(
        "gdetkd_cli.detectors.catalog.name_classes", lambda *_: list_torchvision_categories("COCO_V1", name)
    )
    theirs = getattr(detection, name)(weights="COCO_V1")

    spec = TorchvisionDetector(arch="torchvision", name=name, weights="COCO_V1")
    ours = build_detector(spec, ("thing",), seed=0, keep_classes=True).detector

    assert frozen_eps(ours.module) == frozen_eps(theirs)
    assert frozen_eps(theirs)
