"""A state_dict identifies its detector, for every torchvision family and number of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

from gdetkd_cli import portable
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.recognise import recognise
from gdetkd_cli.errors import ModelError


def build_torchvision(name: str, num_classes: int = 6, **arguments: Any) -> nn.Module:
    """Builds torchvision's detector with shapes only; ``num_classes`` includes background."""
    with torch.device("meta"):
        builder = getattr(detection, name)
        module: nn.Module = builder(weights=None, weights_backbone=None, num_classes=num_classes, **arguments)
    return module


@pytest.mark.parametrize("name", portable.TORCHVISION_DETECTORS)
def test_every_torchvision_detector(name: str) -> None:
    state = build_torchvision(name).state_dict()
    found = recognise(state, "weights.pth")

    twin = "fasterrcnn_mobilenet_v3_large_320_fpn"
    assert found.description["name"] == name or name == twin
    assert found.alternatives == ((twin,) if "mobilenet_v3_large" in name and "fasterrcnn" in name else ())
    assert len(catalog.name_classes(state, found.description, (), None)) == 5
    assert found.description["norm"] == "batch" or name == "ssd300_vgg16"  # which has no normalisation


def test_frozen_weights_are_frozen_and_torchvisions_own_files_have_no_epsilon() -> None:
    state = build_torchvision("retinanet_resnet50_fpn", 91).state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}

    assert recognise(state, "weights.pth").description["norm"] == "frozen"
    assert "norm_eps" not in recognise(state, "weights.pth").description
    published = recognise(state, "/some/where/retinanet_resnet50_fpn_coco-eeacb38b.pth").description
    assert published["norm_eps"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("backbone.body.conv1.weight"),
            r"of no torchvision detector \(nearest is fcos_resnet50_fpn with 318 of its 319 tensors\)",
        ),
        (
            lambda state: state.update({"backbone.body.conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"nearest is fcos_resnet50_fpn with 318 of its 319 tensors",
        ),
        (lambda state: state.update({"extra.weight": torch.zeros(1)}), r"nearest is fcos_resnet50_fpn"),
    ],
    ids=["a tensor missing", "another shape", "a tensor too many"],
)
def test_what_almost_fits_is_refused_with_the_nearest(change: Any, message: str) -> None:
    state = dict(build_torchvision("fcos_resnet50_fpn").state_dict())
    change(state)
    with pytest.raises(ModelError, match=message):
        recognise(state, "weights.pth")


def test_what_fits_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"x\.pth is a state_dict of 1 tensors, first 'a', .*none is near it"):
        recognise({"a": torch.zeros(1)}, "x.pth")


def nested(state: dict[str, Tensor]) -> list[Any]:
    averaged = {"n_averaged": torch.tensor(7), **{f"module.{name}": value for name, value in state.items()}}
    return [state, {"model": state, "epoch": 3}, {"model": {"old": torch.zeros(1)}, "model_ema": averaged}]


@pytest.mark.parametrize("nesting", [0, 1, 2], ids=["at the top", "reference script", "averaged weights"])
def test_a_file_loads_as_the_detector_it_is(nesting: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "ssdlite320_mobilenet_v3_large"
    module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=4).eval()
    path = tmp_path / "weights.pth"
    torch.save(nested(module.state_dict())[nesting], path)

    loaded = catalog.load(path, ("cat", "dog", "cow"))

    assert loaded.detector.class_names == ("cat", "dog", "cow")
    assert loaded.origin == "state_dict"
    assert loaded.notes == (f"{path}: recognised as torchvision's {name}, 3 classes",)
    image = torch.rand(3, 200, 260)
    with torch.no_grad():
        expected, ours = module([image])[0], loaded.detector.predict([image])[0]
    torch.testing.assert_close(ours.boxes, expected["boxes"])
    assert catalog.load(path, ("cat", "dog")).detector.class_names == ("class 1", "class 2", "class 3")
