"""Teacher maps at the student's cells: by hand, and against a slow version for other geometries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdetkd_cli.methods.baselines.alignment import AlignedLevel, LevelPairing, align
from gdetkd_cli.structures import Frame, LevelSpec, Pyramid


def level(channels: int, stride: float, offset: float, shape: tuple[int, int]) -> LevelSpec:
    return LevelSpec("", channels, (stride, stride), (offset, offset), shape)


def pyramid(maps: list[Tensor], strides: list[float], *, scale: float = 1.0, shift: float = 0.0) -> Pyramid:
    levels = [
        level(m.shape[1], stride, stride / 2, (m.shape[2], m.shape[3])) for m, stride in zip(maps, strides, strict=True)
    ]
    images = maps[0].shape[0]
    frame = Frame(
        scale=torch.full((images, 2), scale),
        shift=torch.full((images, 2), shift),
        size=(int(maps[0].shape[2] * strides[0]), int(maps[0].shape[3] * strides[0])),
    )
    return Pyramid(maps=tuple(maps), levels=tuple(levels), frame=frame)


def pair_up(student: Pyramid, teacher: Pyramid, sizes: list[tuple[int, int]]) -> list[AlignedLevel]:
    return align(student, teacher, sizes, LevelPairing(len(student.levels))(student, teacher))


def ramp(stride: float, shape: tuple[int, int]) -> Tensor:
    """(1, 2, H, W): the x and the y of each cell's centre, in pixels."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) * stride for n in shape), indexing="ij")
    return torch.stack([x, y])[None]


def test_equal_geometry_changes_nothing() -> None:
    maps = [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 2, 3)]
    aligned = pair_up(pyramid(maps, [8, 16]), pyramid(maps, [8, 16]), [(32, 48), (32, 48)])
    for found, expected in zip(aligned, maps, strict=True):
        torch.testing.assert_close(found.teacher, expected, atol=1e-5, rtol=1e-5)
        assert found.teacher.data_ptr() == expected.data_ptr()  # not even a copy
        assert found.inside.all()
    assert [found.teacher_level for found in aligned] == [0, 1]


def test_half_a_cell_is_another_place() -> None:
    maps = [ramp(8, (4, 6))]
    student, teacher = pyramid(maps, [8]), pyramid(maps, [8], shift=4.0)
    (found,) = pair_up(student, teacher, [(32, 48)])
    torch.testing.assert_close(found.teacher[0, 0, 0, :5], maps[0][0, 0, 0, :5] + 4)


def test_levels_are_paired_by_stride_in_the_image_and_not_by_index() -> None:
    """The teacher sees the image at twice the size: its stride 16 is 8 pixels of the image."""
    student = pyramid([torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)], [8, 16])
    teacher = pyramid([torch.zeros(1, 1, n, n) for n in (32, 16, 8, 4)], [4, 8, 16, 32], scale=2.0)
    assert [found.teacher_level for found in pair_up(student, teacher, [(64, 64)])] == [2, 3]


def test_places_are_kept_through_unlike_strides_scales_and_shifts() -> None:
    """The teacher's map contains its model-pixel coordinates, so a student's cell must read its own place."""
    student = pyramid([torch.zeros(1, 1, 6, 8)], [8], shift=4.0)
    teacher = pyramid([ramp(10, (9, 12))], [10], scale=1.5, shift=2.0)
    (found,) = pair_up(student, teacher, [(44, 60)])
    for row in range(6):
        for column in range(8):
            x, y = column * 8 + 4 - 4.0, row * 8 + 4 - 4.0  # pixels of the image
            assert bool(found.inside[0, row, column]) == (x <= 60 and y <= 44)
            expected = (x * 1.5 + 2, y * 1.5 + 2)
            if min(expected) >= 5 and expected[0] <= 115 and expected[1] <= 85:  # between the teacher's first and last
                assert found.teacher[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-3)


def test_a_finer_map_is_averaged_over_the_cell() -> None:
    fine = torch.zeros(1, 1, 4, 4)
    fine[0, 0, 0, 0] = 16.0
    (found,) = pair_up(pyramid([torch.zeros(1, 1, 1, 1)], [32]), pyramid([fine], [8]), [(32, 32)])
    assert float(found.teacher) == pytest.approx(1.0)  # picked from its middle, the cell would have 0


def test_a_cell_is_inside_by_its_centre_however_often_the_teacher_is_sampled() -> None:
    """Of 35 pixels at stride 8, the last cell has its centre at 36; of its two samples, one is inside."""
    student, teacher = pyramid([torch.zeros(1, 1, 5, 5)], [8]), pyramid([torch.zeros(1, 1, 10, 10)], [4])
    (found,) = pair_up(student, teacher, [(36, 35)])
    assert found.inside[0, 0].tolist() == [True] * 4 + [False]
    assert found.inside[0, :, 0].tolist() == [True] * 5


def test_the_teacher_gets_no_gradient() -> None:
    theirs = torch.randn(1, 2, 4, 4, requires_grad=True)
    ours = torch.randn(1, 2, 4, 4, requires_grad=True)
    (found,) = pair_up(pyramid([ours], [8]), pyramid([theirs], [8]), [(32, 32)])
    assert found.student.requires_grad
    assert not found.teacher.requires_grad


def test_the_first_batch_decides_the_pairs() -> None:
    """A student of fixed size and a teacher of limited sides see images of other shapes at other scales."""
    student = pyramid([torch.zeros(1, 1, 8, 8)], [8])
    near, far = (pyramid([torch.zeros(1, 1, n, n) for n in (16, 8)], [4, 8], scale=scale) for scale in (0.9, 0.6))
    pairing = LevelPairing(1)
    assert (pairing(student, near), pairing(student, far)) == ([1], [1])
    assert LevelPairing(1)(student, far) == [0]
    resumed = LevelPairing(1)
    resumed.load_state_dict(pairing.state_dict())
    assert resumed(student, far) == [1]
    resumed.load_state_dict({})  # as an older version wrote it
    assert LevelPairing(1).state_dict()["levels"].tolist() == [-1]
