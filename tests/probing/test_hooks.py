"""Hooks read levels that are submodules' outputs, bit-identical to reading operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from twins import NoNeck, SharedHead, TwoWay

from gdetkd_cli.probing.formats import runner as runner_module
from gdetkd_cli.probing.formats.runner import ModuleRunner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe
from gdetkd_cli.probing.record import Address, read

SIZE = (96, 128)


def read_levels(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, times: int = 3
) -> tuple[list[list[Tensor]], list[Tensor], int]:
    """Returns the levels of ``times`` readings, those of a slow one, and how many readings were slow."""
    runner = ModuleRunner(network.eval())
    probed = probe(runner, SIZE, ModelInput())
    addresses = [level.address for level in probed.levels]
    images = [torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))] * 2
    slow: list[Any] = []

    def count_slow(call: Callable[[], object], addresses: list[Address]) -> Any:
        slow.append(addresses)
        return read(call, addresses)

    monkeypatch.setattr(runner_module, "read", count_slow)
    found = [runner.read(probed.call, images, addresses)[1] for _ in range(times)]
    expected = read(lambda: runner.run(probed.call, images), addresses)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    return found, expected[1], len(slow)


@pytest.mark.parametrize("twin", [SharedHead, TwoWay, NoNeck], ids=lambda twin: twin.__name__)
def test_only_the_first_reading_is_slow(twin: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found, expected, slow = read_levels(twin(), monkeypatch)

    assert slow == 1
    for levels in found:
        assert all(torch.equal(a, b) for a, b in zip(levels, expected, strict=True))


def test_nan_in_the_maps_does_not_make_reading_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = SharedHead()
    nn.init.constant_(network.get_submodule("neck.out3").bias, float("nan"))  # type: ignore[arg-type]
    found, _, slow = read_levels(network, monkeypatch)

    assert slow == 1
    assert found[-1][0].isnan().all()


class PadsItself(nn.Conv2d):
    """Pads its input before it convolves."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(pad(images, (0, 1, 0, 1)))


def test_convolution_that_pads_is_read_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = NoNeck()
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    parent, _, leaf = name.rpartition(".")
    own = PadsItself(3, first.out_channels, first.kernel_size, first.stride, padding=0)  # type: ignore[arg-type]
    setattr(network.get_submodule(parent), leaf, own)
    _, _, slow = read_levels(network, monkeypatch)

    assert slow == 3


def test_hooks_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = SharedHead()
    plain = runner_module.HookReader.read

    def read_wrong(self: Any, call: Any, addresses: Any) -> Any:
        found = plain(self, call, addresses)
        assert found is not None
        return found[0], [level + 1 for level in found[1]]

    monkeypatch.setattr(runner_module.HookReader, "read", read_wrong)
    found, expected, slow = read_levels(network, monkeypatch)

    assert slow == 3
    assert all(torch.equal(a, b) for a, b in zip(found[-1], expected, strict=True))
