"""Toys for tests in several folders: detectors that run in milliseconds, and a batch for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import forked
import pytest
import torch
import toy
from hypothesis import HealthCheck, settings
from torch import nn
from torchvision.models import resnet

from gdetkd_cli.compare.trials import Children
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.structures import Batch, LevelSpec, Target

CLASSES = ("circle", "square", "triangle")
_CHILDREN_RUN = Children.run
_ARGUMENTS = {
    "faster-rcnn": toy.SMALL,
    "cascade-rcnn": toy.SMALL,
    "retinanet": {},
    "fcos": {},
}

# The same inputs at every run, because a test that fails by chance helps nobody; `make fuzz` draws many more.
settings.register_profile(
    "fixed", max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _no_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what runs measure, report and draw at their end, which takes seconds, unless a test is about it."""
    if request.node.get_closest_marker("reports") is None:
        for name in ("train.add_measurement", "train.add_report", "compare.add_report", "demo.add_report"):
            monkeypatch.setattr(f"gdetkd_cli.commands.{name}", lambda *_: None)
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("gdetkd_cli.commands.run_files.draw_predictions", lambda **_: None)


@pytest.fixture(autouse=True, scope="session")
def _forked_trials() -> Iterator[pytest.MonkeyPatch]:
    """Forks the processes of ``compare``'s trials instead of starting interpreters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Children, "run", forked.run)
        yield patch


@pytest.fixture
def new_processes(_forked_trials: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts trials as users do."""
    monkeypatch.setattr(Children, "run", _CHILDREN_RUN)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Uses one thread, because more only slow down tiny tensors."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_description() -> Callable[..., dict[str, Any]]:
    """(head, further fields) -> description of a composed detector; ``arguments`` are added to the toy's."""

    def describe(head: str, *, arguments: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        return {
            "kind": "composed",
            "backbone": "resnet18",
            "width": 8,
            "blocks": [1, 1, 1, 1],
            "head": head,
            "pyramid_channels": 16,
            "pyramid_levels": None,
            "image_size": [64, 96],
            "arguments": _ARGUMENTS[head] | (arguments or {}),
            "norm": "batch",
        } | fields

    return describe


def _build_meta_resnet18(**arguments: Any) -> nn.Module:
    """Builds the full network without memory, from which the slim one is cut; filling it takes the most time."""
    with torch.device("meta"):
        return resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], norm_layer=arguments["norm_layer"])


@pytest.fixture(scope="session")
def tiny_detector(tiny_description: Callable[..., dict[str, Any]]) -> Callable[..., Detector]:
    """(head, seed, classes, further fields of the description) -> a new detector in training mode."""
    built: dict[str, Detector] = {}
    measured: dict[str, tuple[LevelSpec, ...]] = {}

    def make(head: str, *, seed: int = 0, classes: tuple[str, ...] = CLASSES, **fields: Any) -> Detector:
        key, network = repr((head, seed, classes, fields)), repr((head, fields | {"arguments": None}))
        if key not in built:
            with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(resnet, "resnet18", _build_meta_resnet18)
                torch.manual_seed(seed)
                built[key] = catalog.build(tiny_description(head, **fields), classes)
            if network in measured:
                vars(built[key])["levels"] = measured[network]  # where cached_property stores them
            measured[network] = built[key].levels
        return copy.deepcopy(built[key])

    return make


@pytest.fixture
def tiny_batch() -> Batch:
    """Three images of different sizes with 2, 0 and 1 objects."""
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=[torch.rand(3, height, width, generator=generator) for height, width in ((48, 64), (64, 40), (56, 56))],
        targets=[
            Target(boxes=torch.tensor([[4.0, 6, 30, 38], [28, 10, 60, 44]]), labels=torch.tensor([1, 3])),
            Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
            Target(boxes=torch.tensor([[10.0, 12, 44, 50]]), labels=torch.tensor([2])),
        ],
        image_ids=torch.tensor([101, 102, 103]),
    )
