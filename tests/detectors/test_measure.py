"""Measured strides and offsets of networks with known geometry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.measure import is_subsampled, measure_levels
from gdetkd_cli.errors import ModelError
from gdetkd_cli.structures import LevelSpec


class Stages(nn.Module):
    """A sequence of stages; each returns a level."""

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = {}
        for i, stage in enumerate(self.stages):
            x = levels[f"stage {i}"] = stage(x)
        return levels


def measure(*stages: nn.Module) -> tuple[LevelSpec, ...]:
    return measure_levels(Stages(*stages).eval())


def conv(inputs: int, outputs: int, kernel: int, stride: int | tuple[int, int], padding: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU())


def stem() -> nn.Module:
    """A ResNet's: stride 4."""
    return nn.Sequential(conv(3, 16, 7, 2, 3), nn.MaxPool2d(3, 2, 1))


def geometry(levels: Sequence[LevelSpec]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    return [(level.stride, level.offset) for level in levels]


@pytest.fixture(params=[0, 1, 2], autouse=True)
def _weights(request: pytest.FixtureRequest) -> None:
    """Repeats the tests with other weights."""
    torch.manual_seed(request.param)


def test_stride_2_convolutions_centre_the_first_cell_on_the_first_pixel() -> None:
    levels = measure(nn.Sequential(conv(3, 16, 3, 2, 1), conv(16, 16, 3, 2, 1)), conv(16, 16, 3, 2, 1))

    # Kernel 3, padding 1: cell 0 looks at pixels -1, 0, 1, whose centre is that of pixel 0, which is at 0.5.
    assert geometry(levels) == [((4.0, 4.0), (0.5, 0.5)), ((8.0, 8.0), (0.5, 0.5))]
    assert [level.shape for level in levels] == [(128, 128), (64, 64)]
    assert [level.channels for level in levels] == [16, 16]
    assert [level.name for level in levels] == ["stage 0", "stage 1"]


def test_resnet_stages() -> None:
    levels = measure(stem(), conv(16, 16, 1, 2, 0), conv(16, 16, 3, 2, 1))

    assert geometry(levels) == [((s, s), (0.5, 0.5)) for s in (4.0, 8.0, 16.0)]


def test_patches_centre_the_first_cell_in_the_patch() -> None:
    levels = measure(conv(3, 16, 4, 4, 0), conv(16, 16, 2, 2, 0))

    assert geometry(levels) == [((4.0, 4.0), (2.0, 2.0)), ((8.0, 8.0), (4.0, 4.0))]


def test_convolutions_without_padding_shift_the_first_cell() -> None:
    levels = measure(stem(), conv(16, 16, 3, 1, 0), conv(16, 16, 3, 2, 1))

    # The second level's cell 0 looks at cells 0, 1, 2 of the first: it lies one cell of 4 pixels further in.
    assert geometry(levels) == [((4.0, 4.0), (0.5, 0.5)), ((4.0, 4.0), (4.5, 4.5)), ((8.0, 8.0), (4.5, 4.5))]


def test_two_levels_of_one_stride() -> None:
    levels = measure(stem(), conv(16, 9, 3, 1, 1), conv(9, 16, 3, 2, 1))

    assert geometry(levels) == [((4.0, 4.0), (0.5, 0.5)), ((4.0, 4.0), (0.5, 0.5)), ((8.0, 8.0), (0.5, 0.5))]
    assert [level.channels for level in levels] == [16, 9, 16]


def test_axes_are_measured_apart() -> None:
    (level,) = measure(nn.Sequential(stem(), conv(16, 16, 3, (1, 2), 1)))

    assert (level.stride, level.offset, level.shape) == ((4.0, 8.0), (0.5, 0.5), (128, 64))


def test_measuring_leaves_the_network_and_the_random_numbers_alone() -> None:
    network = Stages(nn.Sequential(stem(), nn.BatchNorm2d(16))).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    (level,) = measure_levels(network)

    assert level.stride == (4.0, 4.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


class Blind(nn.Module):
    """Returns a map of the right size that does not depend on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[0], 2, x.shape[2] // 2, x.shape[3] // 2)


def test_a_level_that_ignores_the_image() -> None:
    with pytest.raises(ModelError, match="'stage 1' does not respond to the image"):
        measure(stem(), Blind())


def test_a_level_of_one_size() -> None:
    with pytest.raises(ModelError, match=r"'stage 1' has \(7, 7\) cells for 512 pixels and \(7, 7\) for 384"):
        measure(stem(), nn.AdaptiveAvgPool2d(7))


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf")


def test_a_level_that_overflows() -> None:
    with pytest.raises(ModelError, match="'stage 0' does not respond"):
        measure(nn.Sequential(stem(), Infinite()))


class Pooled(nn.Module):
    """A level that max-pools the one before it, like the last of torchvision's two-stage pyramids."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 1, 2)


def test_a_level_that_only_subsamples_the_one_before_is_found() -> None:
    """Values decide, because a convolution with the same step has the same stride and offset."""
    levels = measure(stem(), Pooled(), conv(16, 16, 3, 2, 1), nn.MaxPool2d(2))
    assert [level.subsampled for level in levels] == [False, True, False, True]


def test_constant_maps_say_nothing_of_how_they_were_made() -> None:
    assert is_subsampled(torch.arange(16.0).view(1, 1, 4, 4)[..., ::2, ::2], torch.arange(16.0).view(1, 1, 4, 4))
    assert not is_subsampled(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4))
    assert not is_subsampled(torch.arange(16.0).view(1, 1, 4, 4), torch.arange(16.0).view(1, 1, 4, 4))  # no coarser
    assert not is_subsampled(torch.arange(2.0).view(1, 2, 1, 1), torch.arange(8.0).view(1, 2, 1, 4))
    assert is_subsampled(torch.tensor([[[[1.0, 3.0]]]]), torch.arange(4.0).view(1, 1, 1, 4))  # along one axis
