"""Where the pixels of a network's input lie in an image, measured by changing the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gdetkd_cli.probing.geometry import measure_frame


@pytest.mark.parametrize("network", [(320, 416), (128, 160)])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "size", [(20, 300), (9, 9), (6, 400), (64, 96), (480, 640), (800, 1333), (3000, 4000), (1200, 5000)]
)
def test_images_of_any_size(size: tuple[int, int], antialias: bool, network: tuple[int, int]) -> None:

    def read(image: Tensor) -> Tensor:
        return interpolate(image[None], size=network, mode="bilinear", antialias=antialias)

    frame = measure_frame(read, torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    for axis in (0, 1):
        stride = size[axis] / network[axis]
        assert frame.stride[axis] == pytest.approx(stride, rel=0.02)
        # The middle of the first pixel, half a pixel of the input away at most.
        assert frame.offset[axis] == pytest.approx(stride / 2, abs=max(0.5 * stride, 0.1))


@pytest.mark.parametrize("size", [(64, 96), (480, 640)])
@pytest.mark.parametrize("how", ["deviation", "range", "bytes"])
def test_a_model_that_normalises_each_image(how: str, size: tuple[int, int]) -> None:
    """The image's own mean and range change with the patch, so that every pixel of the input does, a little."""

    def read(image: Tensor) -> Tensor:
        if how == "deviation":
            return ((image - image.mean()) / image.std())[None]
        if how == "range":
            return ((image - image.min()) / (image.max() - image.min()))[None]
        return (255 * image).round().clamp(0, 255)[None]

    frames = [measure_frame(read, image) for image in (torch.rand(3, *size), torch.ones(3, *size))]
    assert frames[0] == frames[1]
    assert frames[0].stride == pytest.approx((1, 1), rel=1e-3)
    assert frames[0].offset == pytest.approx((0.5, 0.5), abs=0.05)
