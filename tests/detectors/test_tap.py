"""Reading intermediate tensors: records are right, and no hook stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.tap import Tap
from gdetkd_cli.errors import TapError


class Toy(nn.Module):
    """Runs ``body`` once, ``head`` on two levels and ``idle`` never."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        self.head = nn.Linear(3, 1)
        self.idle = nn.Linear(1, 1)

    def forward(self, x: Tensor, fail: bool = False) -> list[Tensor]:
        features = self.body(x)
        if fail:
            raise RuntimeError("out of memory")
        return [self.head(features), self.head(2 * features)]


@pytest.fixture
def toy() -> Iterator[Toy]:
    """Checks after each test that no hook stayed."""
    torch.manual_seed(0)
    module = Toy()
    yield module
    assert not any(submodule._forward_hooks for submodule in module.modules())


def test_reads_inputs_and_outputs(toy: Toy) -> None:
    x = torch.randn(4, 2)
    with Tap(toy, ["body", "body.0", "head"]) as tap:
        first, second = toy(x)

    assert tap.inputs("body")[0] is x
    assert torch.equal(tap.output("body.0"), toy.body[0](x))
    assert torch.equal(tap.output("body"), toy.body(x))
    outputs = tap.outputs("head")
    assert outputs[0] is first
    assert outputs[1] is second


def test_gradients_flow_through_what_was_read(toy: Toy) -> None:
    with Tap(toy, ["body"]) as tap:
        toy(torch.ones(1, 2))
    tap.output("body").sum().backward()

    assert toy.body[0].weight.grad is not None


def test_changes_nothing(toy: Toy) -> None:
    x = torch.randn(4, 2)
    plain = toy(x)
    with Tap(toy, ["body", "head", "idle"]):
        tapped = toy(x)

    assert all(map(torch.equal, plain, tapped))


def test_records_only_inside(toy: Toy) -> None:
    tap = Tap(toy, ["body"])
    toy(torch.ones(1, 2))
    with tap:
        toy(torch.ones(1, 2))
    toy(torch.ones(1, 2))

    assert len(tap.outputs("body")) == 1


def test_a_name_that_is_not_there(toy: Toy) -> None:
    with pytest.raises(TapError, match="Toy has no submodule named 'neck'"):
        Tap(toy, ["body", "neck"])


@pytest.mark.parametrize("read", ["output", "inputs", "outputs"])
def test_a_name_that_did_not_run(toy: Toy, read: str) -> None:
    with Tap(toy, ["body", "idle"]) as tap:
        toy(torch.ones(1, 2))
    with pytest.raises(TapError, match="'idle' did not run in this forward"):
        getattr(tap, read)("idle")


@pytest.mark.parametrize("read", ["output", "inputs"])
def test_a_name_that_ran_twice(toy: Toy, read: str) -> None:
    with Tap(toy, ["head"]) as tap:
        toy(torch.ones(1, 2))
    with pytest.raises(TapError, match="'head' ran 2 times in this forward; one was expected"):
        getattr(tap, read)("head")


def test_nothing_stays_hooked_after_an_exception(toy: Toy) -> None:
    tap = Tap(toy, ["body", "head"])
    with pytest.raises(RuntimeError, match="out of memory"), tap:
        toy(torch.ones(1, 2), fail=True)

    assert not any(submodule._forward_hooks for submodule in toy.modules())
    toy(torch.ones(1, 2))
    assert len(tap.outputs("body")) == 1  # of the forward that failed
