"""The running average of weights: numbers made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.engine.average import WeightAverage


class Small(nn.Module):
    """One of each: a parameter, a shared one, running statistics, a counter, a mask, and a buffer of no file."""

    scratch: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.shared = self.layer
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("mask", torch.tensor([True]))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.set(0.0, 0)

    @torch.no_grad()
    def set(self, value: float, count: int) -> None:
        assert self.norm.running_mean is not None and self.norm.num_batches_tracked is not None
        self.layer.weight.fill_(value)
        self.norm.running_mean.fill_(10 * value)
        self.norm.num_batches_tracked.fill_(count)
        self.mask.fill_(count == 0)
        self.scratch = torch.full((1 + count,), value)  # as anchors that depend on the image

    def read(self) -> tuple[float, float, int, bool]:
        assert self.norm.running_mean is not None and self.norm.num_batches_tracked is not None
        mean, count = float(self.norm.running_mean), int(self.norm.num_batches_tracked)
        return float(self.layer.weight.detach()), mean, count, bool(self.mask)


def test_weights_and_statistics_are_averaged_and_counters_copied() -> None:
    module = Small()
    average = WeightAverage(module, decay=0.15)
    module.set(10.0, 1)
    average.update(0)  # (1 + 0) / (10 + 0) = 0.1 is below 0.15: 0.1 * 0 + 0.9 * 10
    with average.applied():
        assert module.read() == (pytest.approx(9.0), pytest.approx(90.0), 1, False)
        assert module.scratch.tolist() == [10.0, 10.0]
    assert module.read() == (10.0, 100.0, 1, False)
    module.set(20.0, 2)
    average.update(1)  # 2 / 11 is above 0.15: 0.15 * 9 + 0.85 * 20
    average.apply()
    assert module.read() == (pytest.approx(18.35), pytest.approx(183.5), 2, False)


def test_the_weights_come_back_after_an_error() -> None:
    module = Small()
    average = WeightAverage(module, decay=0.5)
    module.set(10.0, 1)

    def evaluate() -> None:
        with average.applied():
            assert module.read()[0] == 0.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert module.read()[0] == 10.0


def test_a_buffer_that_changes_its_shape_is_copied() -> None:
    module = nn.Linear(1, 1)
    module.register_buffer("seen", torch.zeros(0))  # as observers of quantisation before their first image
    average = WeightAverage(module, decay=0.5)
    module.seen = torch.tensor([3.0, 4.0])
    average.update(0)
    assert average.state_dict()["seen"].tolist() == [3.0, 4.0]


def test_stored_averages_go_on() -> None:
    module, other = Small(), Small()
    first, second = WeightAverage(module, decay=0.9), WeightAverage(other, decay=0.9)
    module.set(10.0, 1)
    first.update(0)
    second.load_state_dict(first.state_dict())
    module.set(20.0, 2)
    other.set(20.0, 2)
    first.update(1)
    second.update(1)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    second.load_state_dict(None)
    assert second.state_dict()["layer.weight"].item() == 20.0
    with pytest.raises(ValueError, match="its averaged weights have other names"):
        second.load_state_dict({"weight": torch.zeros(1)})
