"""Region features by measured geometry: RoIAlign's numbers at the right place of the right level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from gdetkd_cli.detectors import pooling
from gdetkd_cli.detectors.pooling import (
    assign_levels,
    convert_to_cells,
    pool_all_levels,
    pool_assigned,
    pool_level,
    separable_roi_align,
)
from gdetkd_cli.structures import Frame, LevelSpec, Pyramid, Regions


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_regions(boxes: list[list[float]] | Tensor, image_index: list[int]) -> Regions:
    index = torch.tensor(image_index, dtype=torch.int64)
    return Regions(
        boxes=torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4),
        image_index=index,
        candidate=torch.full_like(index, -1),
    )


def make_pyramid(
    maps: list[Tensor],
    strides: list[tuple[float, float]],
    offsets: list[tuple[float, float]],
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: tuple[float, float] = (0.0, 0.0),
) -> Pyramid:
    images = maps[0].shape[0]
    levels = tuple(
        LevelSpec(name=str(i), channels=m.shape[1], stride=s, offset=o, shape=(m.shape[2], m.shape[3]))
        for i, (m, s, o) in enumerate(zip(maps, strides, offsets, strict=True))
    )
    frame = Frame(scale=torch.tensor([scale] * images), shift=torch.tensor([shift] * images), size=(64, 64))
    return Pyramid(maps=tuple(maps), levels=levels, frame=frame)


H, W = 9, 13
INSIDE = [[1.0, 2, 5, 7], [0.3, 0.2, 12.9, 8.8], [3.3, 3.1, 3.9, 3.6]]
PARTLY_OUTSIDE = [[-4.0, -3, 6, 5], [8, 4, 20, 15], [-30, -30, 60, 60], [-0.9, -0.9, 1.5, 1.2]]
OUTSIDE = [[-20.0, -20, -10, -10], [30, 2, 40, 6], [13.0, 0, 14.5, 9]]
DEGENERATE = [[4.0, 4, 4, 4], [2, 3, 2, 8], [6, 6, 5, 5], [13, 9, 13, 9], [0, 0, 0, 0]]


@pytest.mark.parametrize("boxes", [INSIDE, PARTLY_OUTSIDE, OUTSIDE, DEGENERATE], ids=str)
@pytest.mark.parametrize(("size", "sampling_ratio"), [(7, 2), (1, 2), (3, 1), (2, 4)])
def test_is_torchvisions_roi_align(boxes: list[list[float]], size: int, sampling_ratio: int) -> None:
    """Forward and gradient, over two images."""
    both = torch.tensor(boxes * 2)
    index = torch.tensor([0] * len(boxes) + [1] * len(boxes))
    features = draw(2, 3, H, W).requires_grad_()
    copied = features.detach().clone().requires_grad_()
    ours = separable_roi_align(features, both, index, size=size, sampling_ratio=sampling_ratio)
    theirs = roi_align(
        copied, torch.cat([index[:, None], both], dim=1), size, sampling_ratio=sampling_ratio, aligned=True
    )

    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    weight = draw(*ours.shape, seed=1)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(features.grad, copied.grad, rtol=0, atol=1e-4)


@pytest.mark.parametrize("images", [4, 5], ids=["as many in every image", "none in the last image"])
def test_is_torchvisions_roi_align_on_random_boxes(images: int) -> None:
    corners = 12 * draw(60, 2, seed=1) + 5
    boxes = torch.cat([corners, corners + 8 * draw(60, 2, seed=2).abs()], dim=1)
    index = torch.arange(60) // 15  # images 0, 1, 2, 3
    features = draw(images, 4, H, W).requires_grad_()
    copied = features.detach().clone().requires_grad_()
    weight = draw(60, 4, 7, 7, seed=3)
    ours = separable_roi_align(features, boxes, index, size=7, sampling_ratio=2)
    (ours * weight).sum().backward()

    theirs = roi_align(copied, torch.cat([index[:, None], boxes], dim=1), 7, sampling_ratio=2, aligned=True)
    (theirs * weight).sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    torch.testing.assert_close(features.grad, copied.grad, rtol=0, atol=1e-4)


def test_no_regions_keep_a_gradient_path() -> None:
    features = draw(2, 3, H, W).requires_grad_()
    index = torch.zeros(0, dtype=torch.int64)
    pooled = separable_roi_align(features, torch.zeros(0, 4), index, size=7, sampling_ratio=2)
    pooled.sum().backward()

    assert pooled.shape == (0, 3, 7, 7)
    assert features.grad is not None


def test_both_ways_of_pooling_a_level_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps go through the general operator."""
    pyramid = make_pyramid([draw(2, 3, H, W)], [(4.0, 5.0)], [(0.5, 2.0)], scale=(1.5, 2.0))
    regions = make_regions([[1.0, 2, 20, 15], [-5, 3, 30, 40], [4, 4, 4, 4]], [0, 1, 1])
    separable = pool_level(pyramid, 0, regions, size=7, sampling_ratio=2)
    monkeypatch.setattr(pooling, "SEPARABLE_CELLS", 0)

    torch.testing.assert_close(pool_level(pyramid, 0, regions, size=7, sampling_ratio=2), separable, rtol=0, atol=2e-5)


@pytest.mark.parametrize("limit", [0, 10**6], ids=["general", "separable"])
def test_float32_under_autocast(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "SEPARABLE_CELLS", limit)
    pyramid = make_pyramid([draw(1, 3, H, W), draw(1, 3, H, W)], [(4.0, 4.0), (8.0, 8.0)], [(0.5, 0.5)] * 2)
    regions = make_regions([[1.0, 2, 20, 15], [3, 4, 50, 40]], [0, 0])
    outside = pool_assigned(pyramid, regions, torch.tensor([0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        level = pool_level(pyramid, 0, regions, size=7, sampling_ratio=2)
        inside = pool_assigned(pyramid, regions, torch.tensor([0, 1]))

    assert level.dtype == inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_cells_by_hand() -> None:
    level = LevelSpec(name="", channels=1, stride=(4.0, 8.0), offset=(0.5, 4.0), shape=(8, 8))
    # x: (4 - 4) / 8 + 0.5 = 0.5, the centre of the first cell; (20 - 4) / 8 + 0.5 = 2.5.
    # y: (0.5 - 0.5) / 4 + 0.5 = 0.5;                            (12.5 - 0.5) / 4 + 0.5 = 3.5.
    assert convert_to_cells(torch.tensor([[4.0, 0.5, 20.0, 12.5]]), level).tolist() == [[0.5, 0.5, 2.5, 3.5]]


GEOMETRIES = [
    ((4.0, 4.0), (0.5, 0.5)),  # stacked convolutions with stride 2 and padding 1
    ((4.0, 4.0), (2.0, 2.0)),  # patches
    ((8.0, 4.0), (3.5, 0.5)),  # unlike axes
    ((8.0, 16.0), (2.5, 8.0)),
]


@pytest.mark.parametrize(("stride", "offset"), GEOMETRIES)
@pytest.mark.parametrize("cell", [(2, 3), (0, 0), (7, 1)])
def test_a_box_over_a_cell_reads_that_cell(
    stride: tuple[float, float], offset: tuple[float, float], cell: tuple[int, int]
) -> None:
    """One hot cell on the second level, and a box over this cell in pixels of the image before resizing."""
    hot = torch.zeros(1, 1, 8, 8)
    hot[0, 0, cell[0], cell[1]] = 1.0
    scale, shift = (2.0, 0.5), (3.0, -1.0)  # x, y
    pyramid = make_pyramid(
        [torch.zeros(1, 1, 16, 16), hot], [(2.0, 2.0), stride], [(0.5, 0.5), offset], scale=scale, shift=shift
    )
    centre = [offset[1] + cell[1] * stride[1], offset[0] + cell[0] * stride[0]]  # model pixels, x and y
    half = [stride[1] / 2, stride[0] / 2]
    low, high = (
        [(c + sign * h - t) / s for c, h, s, t in zip(centre, half, scale, shift, strict=True)] for sign in (-1, 1)
    )
    regions = make_regions([[*low, *high]], [0])

    assert pool_level(pyramid, 1, regions, size=1, sampling_ratio=1).item() == pytest.approx(1, abs=1e-5)
    assert pool_level(pyramid, 0, regions, size=1, sampling_ratio=1).item() == 0
    beside = make_regions(regions.boxes + torch.tensor([stride[1] / scale[0], 0, stride[1] / scale[0], 0]), [0])
    assert pool_level(pyramid, 1, beside, size=1, sampling_ratio=1).item() == pytest.approx(0, abs=1e-5)


def test_pooling_reads_the_same_place_on_every_level() -> None:
    """Maps contain their cells' x and y in pixels, so every level returns the box's centre."""
    maps, strides, offsets = [], [], []
    for (stride, offset), size in zip(GEOMETRIES, (32, 32, 32, 16), strict=True):
        y = offset[0] + stride[0] * torch.arange(size)
        x = offset[1] + stride[1] * torch.arange(size)
        maps.append(torch.stack(torch.meshgrid(x, y, indexing="xy"))[None])
        strides.append(stride)
        offsets.append(offset)
    pyramid = make_pyramid(maps, strides, offsets, scale=(2.0, 2.0))
    regions = make_regions([[20.0, 10.0, 40.0, 28.0], [12.0, 20.0, 36.0, 32.0]], [0, 0])

    for pooled in pool_all_levels(pyramid, regions, size=7, sampling_ratio=2):
        torch.testing.assert_close(pooled.mean(dim=(2, 3)), torch.tensor([[60.0, 38.0], [48.0, 52.0]]))
        # The first bin's centre lies at 1/14 of the box.
        torch.testing.assert_close(pooled[0, 0, 0, 0], torch.tensor(40 + 40 / 14))


def pyramid_of_strides(*strides: int, channels: int = 2) -> Pyramid:
    maps = [torch.full((2, channels, 256 // s, 256 // s), float(s)) for s in strides]
    return make_pyramid(maps, [(float(s), float(s)) for s in strides], [(0.5, 0.5)] * len(strides))


def test_assignment_by_hand() -> None:
    sides = torch.tensor([10.0, 80.0, 160.0, 320.0, 640.0, 5000.0])  # 14 sqrt(2) = 19.8 cells: 79, 158, 317, 634
    boxes = torch.stack([torch.zeros(6), torch.zeros(6), sides, sides], dim=1)
    assignment = assign_levels(
        pyramid_of_strides(4, 8, 16, 32), make_regions(boxes, [0] * 6), cells_per_side=14 * 2**0.5
    )

    assert assignment.tolist() == [0, 0, 1, 2, 3, 3]


def test_assignment_is_torchvisions_rule() -> None:
    """floor(4 + log2(side / 224)) on levels 2 to 5 equals the nearest octave to 14 sqrt(2) cells."""
    corners = 100 * draw(500, 2, seed=3).abs()
    sides = 2 ** (3 + 8 * torch.rand(500, 2, generator=torch.Generator().manual_seed(4)))
    boxes = torch.cat([corners, corners + sides], dim=1)
    mapper = LevelMapper(k_min=2, k_max=5, canonical_scale=224, canonical_level=4)

    ours = assign_levels(pyramid_of_strides(4, 8, 16, 32), make_regions(boxes, [0] * 500), cells_per_side=14 * 2**0.5)
    assert torch.equal(ours, mapper([boxes]))
    assert ours.bincount().min() > 20


def test_assignment_measures_in_model_pixels() -> None:
    pyramid = pyramid_of_strides(4, 8, 16)
    larger = Pyramid(
        maps=pyramid.maps,
        levels=pyramid.levels,
        frame=Frame(scale=torch.tensor([[1.0, 1.0], [4.0, 4.0]]), shift=torch.zeros(2, 2), size=(256, 256)),
    )
    regions = make_regions([[10.0, 10, 90, 90], [10, 10, 90, 90]], [0, 1])

    assert assign_levels(larger, regions, cells_per_side=14 * 2**0.5).tolist() == [0, 2]


def test_assignment_of_boxes_without_area_and_of_none() -> None:
    pyramid = pyramid_of_strides(4, 8)
    regions = make_regions([[5.0, 5, 5, 5], [5, 5, 4, 9]], [0, 0])

    assert assign_levels(pyramid, regions, cells_per_side=8).tolist() == [0, 0]
    assert assign_levels(pyramid, make_regions([], []), cells_per_side=8).shape == (0,)


def test_pool_assigned_takes_each_region_from_its_level() -> None:
    pyramid = pyramid_of_strides(4, 8, 16)
    regions = make_regions([[10.0, 10, 50, 50], [20, 20, 90, 80], [10, 10, 60, 60]], [0, 0, 1])
    pooled = pool_assigned(pyramid, regions, torch.tensor([2, 0, 1]))

    assert pooled.shape == (3, 2, 7, 7)
    torch.testing.assert_close(pooled.mean(dim=(1, 2, 3)), torch.tensor([16.0, 4.0, 8.0]))


def test_pool_assigned_pads_narrow_levels() -> None:
    maps = [torch.ones(1, 5, 16, 16, requires_grad=True), torch.ones(1, 3, 8, 8, requires_grad=True)]
    pyramid = make_pyramid(maps, [(4.0, 4.0), (8.0, 8.0)], [(0.5, 0.5)] * 2)
    regions = make_regions([[10.0, 10, 50, 50], [20, 20, 44, 44]], [0, 0])
    pooled = pool_assigned(pyramid, regions, torch.tensor([1, 0]))
    pooled.sum().backward()

    assert pooled.shape == (2, 5, 7, 7)
    torch.testing.assert_close(pooled[0, :3], torch.ones(3, 7, 7))
    assert (pooled[0, 3:] == 0).all()
    torch.testing.assert_close(pooled[1], torch.ones(5, 7, 7))
    for features in maps:
        assert features.grad is not None
        assert features.grad.sum() > 0


def test_pool_assigned_of_no_regions() -> None:
    nothing = make_regions([], [])
    pooled = pool_assigned(pyramid_of_strides(4, 8), nothing, torch.zeros(0, dtype=torch.int64))

    assert pooled.shape == (0, 2, 7, 7)
