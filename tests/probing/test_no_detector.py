"""Probing refuses networks that return images, and accepts heat maps and segmenters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forms import FORMATS, build, run
from torch import Tensor, nn
from torch.nn.functional import interpolate
from twins import Body, conv

from gdetkd_cli.errors import NoPyramidError


def sharpen(padding: int) -> nn.Module:
    """Makes an SRCNN-like network; without padding it trims 6 pixels from every side."""
    a, b, c = (nn.Conv2d(i, o, k, padding=padding * (k // 2)) for i, o, k in ((3, 8, 9), (8, 6, 1), (6, 3, 5)))
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)


def enlarge() -> nn.Module:
    """Makes an ESPCN-like network; the channels become 3 x 3 pixels."""
    return nn.Sequential(conv(3, 8, 5), conv(8, 8), nn.Conv2d(8, 27, 3, padding=1), nn.PixelShuffle(3))


def encode_and_decode() -> nn.Module:
    """Makes an autoencoder."""
    down = [conv(3, 8, 3, 2), conv(8, 12, 3, 2), conv(12, 16, 3, 2)]
    up = [nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in ((16, 12), (12, 8), (8, 3))]
    return nn.Sequential(*down, *up, nn.Sigmoid())


class Denoiser(nn.Module):
    """A U-Net; it returns the image less its noise."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.up4, self.up3, self.last = Body(), conv(28, 12), conv(20, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        c3, c4, c5 = self.body(x)
        p4 = self.up4(torch.cat([interpolate(c5, scale_factor=2.0), c4], dim=1))
        p3 = self.up3(torch.cat([interpolate(p4, scale_factor=2.0), c3], dim=1))
        return x - interpolate(self.last(p3), scale_factor=8.0)


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "SRCNN": lambda: sharpen(1),
    "SRCNN without padding": lambda: sharpen(0),
    "ESPCN": enlarge,
    "autoencoder": encode_and_decode,
    "U-Net": Denoiser,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "frozen", "exported", "onnx"])
@pytest.mark.parametrize("network", IMAGES.values(), ids=IMAGES)
def test_image_to_image_networks_have_no_levels(network: Callable[[], nn.Module], form: str) -> None:
    with pytest.raises(NoPyramidError, match="gives images of the input's size or larger") as caught:
        run(FORMATS[form](build(network)))
    assert caught.value.exit_code == 3


class Segmenter(nn.Module):
    """FCN-like: its scores are enlarged to the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Sequential(conv(16, 8), nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return interpolate(self.head(self.body(x)[2]), scale_factor=32.0)


def test_a_segmenter_has_a_level() -> None:
    assert [level.channels for level in run(build(Segmenter)).levels] == [8]


class HeatMaps(nn.Module):
    """CenterNet-like with one class: heat maps, sizes and shifts at a quarter of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 8, 7, 2), conv(8, 12, 3, 2))
        self.heads = nn.ModuleList(nn.Sequential(conv(12, 8), nn.Conv2d(8, c, 1)) for c in (1, 2, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        level = self.body(x)
        return [head(level) for head in self.heads]


def test_heat_maps_are_no_images() -> None:
    (level,) = run(build(HeatMaps)).levels
    assert (level.channels, level.shape) == (12, (48, 64))
