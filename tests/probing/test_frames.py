"""Where the pixels of a network's input lie in an image, measured by changing the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gdetkd_cli.probing.geometry import measure_frame


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "size", [(20, 300), (9, 9), (6, 400), (64, 96), (480, 640), (800, 1333), (3000, 4000), (1200, 5000)]
)
def test_images_of_any_size(size: tuple[int, int], antialias: bool) -> None:
    network = (320, 416)

    def read(image: Tensor) -> Tensor:
        return interpolate(image[None], size=network, mode="bilinear", antialias=antialias)

    frame = measure_frame(read, torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    for axis in (0, 1):
        stride = size[axis] / network[axis]
        assert frame.stride[axis] == pytest.approx(stride, rel=0.02)
        # The middle of the first pixel, half a pixel of the input away at most.
        assert frame.offset[axis] == pytest.approx(stride / 2, abs=max(0.5 * stride, 0.1))
