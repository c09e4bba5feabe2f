"""A recipe's detector block becomes the detector that torchvision itself would build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, detection
from torchvision.ops.misc import FrozenBatchNorm2d

from gdetkd_cli.assembly import build_detector, detector
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.weights import list_torchvision_categories
from gdetkd_cli.recipe.schema import ComposedDetector, TorchvisionDetector


def save_student(path: Path, classes: tuple[str, ...]) -> dict[str, Any]:
    """Writes a file of gdetkd; returns the block of a recipe that names it in ``weights``."""
    block = {"arch": "composed", "backbone": "resnet18", "width": 8, "head": "fcos", "pyramid_channels": 16}
    built = build_detector(ComposedDetector.model_validate(block), classes, seed=0)
    catalog.save(path, built.detector, built.description)
    return {**block, "weights": str(path)}


def test_weights_of_a_student_name_their_classes(tmp_path: Path) -> None:
    spec = ComposedDetector.model_validate(save_student(tmp_path / "s.pt", ("cat", "dog")))
    teacher = build_detector(spec, ("dog", "cat"), seed=1, keep_classes=True)
    assert teacher.detector.class_names == ("cat", "dog") and teacher.trained_head
    assert build_detector(spec, ("bird", "fish"), seed=1, keep_classes=True).detector.class_names == ("cat", "dog")
    same = build_detector(spec, ("dog", "cat"), seed=1)
    assert same.detector.class_names == ("cat", "dog") and same.trained_head
    other = build_detector(spec, ("bird", "fish"), seed=1)
    assert other.detector.class_names == ("bird", "fish") and not other.trained_head
    assert any("trained for other classes; these layers start fresh" in note for note in other.notes)
    name = "head.classification_head.cls_logits.weight"
    states = [built.detector.module.state_dict() for built in (same, other)]
    assert not torch.equal(states[0][name], states[1][name])
    assert torch.equal(states[0]["backbone.body.conv1.weight"], states[1]["backbone.body.conv1.weight"])


def test_a_published_teacher_has_the_classes_of_coco(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's weights have 90 outputs, ten of them for no class, which would make the class lists differ."""
    name = "fcos_resnet50_fpn"
    published = list_torchvision_categories("COCO_V1", name)
    assert published is not None and len(published) == 90
    spec = TorchvisionDetector(arch="torchvision", name=name, weights="COCO_V1")
    fresh = TorchvisionDetector(arch="torchvision", name=name, norm="frozen")
    state = build_detector(fresh, published, seed=0).detector.module.state_dict()
    monkeypatch.setattr(detector, "read_torchvision_weights", lambda *_: state)
    built = build_detector(spec, ("thing",), seed=0, keep_classes=True)
    assert built.detector.class_names == tuple(c for c in published if c != "N/A")
    assert len(built.detector.class_names) == 80
    assert "10 outputs named N/A, which were trained for no class, are left out" in built.notes


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
    monkeypatch.setattr(detector, "load_state", lambda *_, **__: [])
    monkeypatch.setattr(
        "gdetkd_cli.detectors.catalog.name_classes", lambda *_: list_torchvision_categories("COCO_V1", name)
    )
    theirs = getattr(detection, name)(weights="COCO_V1")

    spec = TorchvisionDetector(arch="torchvision", name=name, weights="COCO_V1")
    ours = build_detector(spec, ("thing",), seed=0, keep_classes=True).detector

    assert frozen_eps(ours.module) == frozen_eps(theirs)
    assert frozen_eps(theirs)
