"""Descriptions: their classes and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import CLASSES, SPECS
from torch import Tensor, nn

from gdetkd_cli import portable
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import ModelError

pytestmark = pytest.mark.usefixtures("small")
KEYS = [
    "faster-rcnn on resnet18, levels 2-6, batch",
    "retinanet on resnet18, levels 3-7, frozen",
    "fcos on resnet18, levels 3-7, batch",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]


@pytest.mark.parametrize("key", KEYS)
def test_classes_of_weights(key: str) -> None:
    description = SPECS[key].description
    five, four = tuple("abcde"), tuple("wxyz")
    state = portable.build(description, 5).state_dict()

    random = torch.get_rng_state()
    assert catalog.name_classes(state, description, four, five) == five
    assert catalog.name_classes(state, description, four, None) == tuple(f"class {i}" for i in range(1, 6))
    assert torch.equal(torch.get_rng_state(), random)


def test_classes_of_weights_by_the_data_and_of_other_weights() -> None:
    description = SPECS["fcos on resnet18, levels 3-7, batch"].description
    state = portable.build(description, 5).state_dict()

    assert catalog.name_classes(state, description, tuple("abcde"), tuple("wxyz")) == tuple("abcde")
    assert catalog.name_classes({"other": torch.ones(1)}, description, tuple("wxyz"), None) == tuple("wxyz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hf"}, "unknown architecture kind 'hf'; expected 'torchvision', 'composed', 'factory'"),
        ({"backbone": "resnet19"}, r"unknown backbone 'resnet19'; known: resnet18, .*; did you mean resnet18\?$"),
        ({"head": "yolo"}, "unknown head 'yolo'; known: faster-rcnn, cascade-rcnn, retinanet, fcos"),
        (
            {"arguments": {"colour": 1}},
            "head 'fcos' does not take these arguments: colour; it takes anchor_generator, anchor_sizes",
        ),
        ({"arguments": {"head_convs": 0}}, "head 'fcos': head_convs must be a whole number of at least 1, got 0"),
        (
            {"arguments": {"anchor_sizes": [[8], [16]]}},
            r"anchor_sizes must be one list of pixels for each of the 5 levels, as .*, got \[\[8\], \[16\]\]",
        ),
        ({"arguments": {"anchor_sizes": [8, 16, 32, 64, 128]}}, "anchor_sizes must be one list of pixels for each"),
        ({"arguments": {"anchor_sizes": "hello"}}, "anchor_sizes must be one list of pixels for each"),
        (
            {"arguments": {"anchor_sizes": [[8, 9], [16], [32], [64], [128]]}},
            "every level must have the same number of anchor_sizes",
        ),
        ({"width": 0.001}, "resnet18: width must be at least 1 channel, got 0.001"),
        ({"backbone": "mobilenet_v2"}, "'blocks' applies to ResNets only, not to mobilenet_v2"),
        (
            {"kind": "torchvision", "name": "yolo"},
            "unknown torchvision detector 'yolo'; known: fasterrcnn_.*_large$",
        ),
        ({"kind": "torchvision", "name": "RetinaNet"}, r"; did you mean retinanet_resnet50_fpn\?$"),
        (
            {"kind": "torchvision", "name": "fcos_resnet50_fpn", "arguments": {"colour": 1}},
            "fcos_resnet50_fpn does not take these arguments: colour; it takes anchor_generator",
        ),
    ],
)
def test_descriptions_that_cannot_be_built(
    change: dict[str, Any], message: str, tiny_description: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ModelError, match=message):
        catalog.build(tiny_description("fcos") | change, CLASSES)


def test_arguments_that_the_transform_takes(tiny_description: Callable[..., dict[str, Any]]) -> None:
    module: Any = catalog.build(tiny_description("fcos", arguments={"size_divisible": 128}), CLASSES).module

    assert module.transform.size_divisible == 128


def test_a_module_of_no_family() -> None:
    with pytest.raises(ModelError, match="Linear is not a supported detector; expected torchvision's"):
        catalog.wrap(nn.Linear(2, 2), CLASSES)


def test_descriptions_are_not_changed_by_building(tiny_description: Callable[..., dict[str, Any]]) -> None:
    for head in portable.HEADS:
        description = tiny_description(head)
        before = repr(description)
        catalog.build(description, CLASSES)
        assert repr(description) == before


def test_frozen_norms_do_not_train() -> None:
    for key in ("ssdlite320_mobilenet_v3_large", "retinanet on resnet18, levels 3-7, frozen"):
        module = catalog.build(SPECS[key].description | {"norm": "frozen"}, CLASSES).module
        assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
        assert not any(name.endswith("num_batches_tracked") for name in module.state_dict())


def test_slim_and_shallow_resnets() -> None:
    module: Any = catalog.build(SPECS["faster-rcnn on resnet18, levels 2-6, batch"].description, CLASSES).module
    body = module.backbone.body

    assert [len(body[f"layer{i}"]) for i in range(1, 5)] == [1, 1, 1, 1]
    assert [body[f"layer{i}"][-1].conv2.out_channels for i in range(1, 5)] == [8, 16, 32, 64]
    assert body.conv1.out_channels == 8
    assert isinstance(body.conv1.weight, Tensor)


@pytest.mark.parametrize("key", KEYS)
def test_outputs_without_a_class_are_left_out(key: str) -> None:
    torch.manual_seed(0)
    names = ("a", "N/A", "b", "N/A", "c")
    whole = catalog.build(SPECS[key].description, names)
    low = torch.tensor([0.0, 1, -50, 0, -50, 2])  # the placeholders' scores do not count
    with torch.no_grad():
        for name, value in whole.module.named_parameters():
            value.add_(0.02 * torch.randn_like(value))  # so that no two scores are equal
            if name.endswith(("cls_score.bias", "classification_head.cls_logits.bias")):
                value.add_(low.repeat(len(value) // 6))
    smaller = catalog.drop_placeholders(whole, SPECS[key].description)
    assert smaller.class_names == ("a", "b", "c")
    whole.module.eval()
    images = [torch.rand(3, 64, 96)]
    (before,), (after,) = whole.predict(images), smaller.predict(images)
    numbers = torch.tensor([0, 1, 0, 2, 0, 3])[before.labels]
    real = numbers > 0
    if "ssd" not in key:  # whose placeholders have scores like the others
        assert 0 < real.sum() < len(real)
        assert torch.equal(numbers[real], after.labels)
        assert torch.allclose(before.scores[real], after.scores, atol=1e-5)
        assert torch.allclose(before.boxes[real], after.boxes, atol=1e-3)
    own, all_rows = (each.module.state_dict() for each in (smaller, whole))
    assert any(6 * len(own[name]) == 4 * len(value) for name, value in all_rows.items() if value.dim())
