"""Equations of other methods, by hand and against slow versions from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from gdetkd_cli.methods.baselines.cwd import channel_divergence
from gdetkd_cli.methods.baselines.fgd import (
    DENSE_CELLS,
    TWO_STAGE_CELLS,
    ContextBlock,
    Scale,
    attention,
    focal_losses,
    global_loss,
    object_masks,
    published_scale,
)
from gdetkd_cli.methods.baselines.fitnet import map_imitation_loss
from gdetkd_cli.methods.baselines.gt_mask import inside_box_masks, near_object_masks
from gdetkd_cli.methods.baselines.logit import class_map_loss
from gdetkd_cli.methods.baselines.pkd import pearson_loss


def row(*values: float) -> Tensor:
    """(1, 1, 1, W)."""
    return torch.tensor([[[list(values)]]])


def everywhere(maps: Tensor) -> Tensor:
    return torch.ones(maps.shape[0], *maps.shape[2:], dtype=torch.bool)


def random_maps(seed: int, n: int = 2, c: int = 3, h: int = 4, w: int = 5) -> Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def some(maps: Tensor) -> Tensor:
    """A mask without one column of one image and one row of the other."""
    inside = everywhere(maps)
    inside[0, :, -1] = False
    inside[1, 0] = False
    return inside


# ------------------------------------------------------------------------------------------------- fitnet, regions


def test_whole_maps_by_hand() -> None:
    student, teacher = torch.tensor([[[[1.0, 2, 9]], [[0.0, 0, 9]]]]), torch.tensor([[[[0.0, 0, 0]], [[1.0, 4, 0]]]])
    weight = torch.tensor([[[1.0, 3, 0]]])  # the last cell does not count
    assert float(map_imitation_loss(student, teacher, weight)) == pytest.approx(
        (1 * (1 + 1) / 2 + 3 * (4 + 16) / 2) / 4
    )


def test_no_cell_gives_zero_with_a_gradient() -> None:
    student = random_maps(0).requires_grad_()
    nothing = ~everywhere(student)
    for loss in (
        map_imitation_loss(student, random_maps(1), nothing),
        pearson_loss(student, random_maps(1), nothing),
        channel_divergence(student, random_maps(1), nothing, 1.0),
    ):
        assert float(loss.detach()) == 0
        assert loss.requires_grad


# --------------------------------------------------------------------------------------------------------- gt_mask


def squares(side: float) -> torch.Tensor:
    """One anchor, in cells."""
    return torch.full((1, 2), side)


def test_cells_near_an_object_by_hand() -> None:
    """A box of 2 x 2 cells on a row of 6 cells; anchors of 2 x 2: overlap 1/3 one cell to either side, 1 on it."""
    boxes = torch.tensor([[2.0, -0.5, 4, 1.5]])  # its middle is at (3, 0.5), between the centres 2.5 and 3.5
    best = box_iou(torch.tensor([[1.5, -0.5, 3.5, 1.5]]), boxes)[0, 0]  # 3/5 at the two nearest cells
    (mask,) = near_object_masks([boxes], [(1, 6)], [squares(2.0)], share=0.5)
    further = box_iou(torch.tensor([[0.5, -0.5, 2.5, 1.5]]), boxes)[0, 0]  # 1/7
    assert best == pytest.approx(0.6)
    assert further < 0.3
    assert mask.tolist() == [[False, False, True, True, False, False]]


def test_an_object_counts_on_the_level_of_its_size() -> None:
    fine, coarse = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 4, 4]])
    on_fine, on_coarse = near_object_masks([fine, coarse], [(8, 8), (4, 4)], [squares(2.0), squares(4.0)], share=0.9)
    assert not on_fine.any()  # anchors of two cells overlap it by a sixteenth
    assert on_coarse.any()
    (nothing,) = near_object_masks([fine[:0]], [(8, 8)], [squares(2.0)], share=0.5)
    assert not nothing.any()


def test_near_cells_against_a_slow_version() -> None:
    boxes = torch.tensor([[1.0, 2, 7, 5], [4.0, 0, 6, 8]])
    anchors = [(3.0 / math.sqrt(ratio), 3.0 * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0)]
    (mask,) = near_object_masks([boxes], [(6, 9)], [torch.tensor(anchors)], share=0.5)
    expected = torch.zeros(6, 9, dtype=torch.bool)
    for box in boxes:
        overlaps = torch.zeros(6, 9, 3)
        for y in range(6):
            for x in range(9):
                for a, (w, h) in enumerate(anchors):
                    left, top = x + 0.5 - w / 2, y + 0.5 - h / 2
                    iw = max(min(left + w, float(box[2])) - max(left, float(box[0])), 0)
                    ih = max(min(top + h, float(box[3])) - max(top, float(box[1])), 0)
                    union = w * h + float((box[2] - box[0]) * (box[3] - box[1])) - iw * ih
                    overlaps[y, x, a] = iw * ih / union
        expected |= (overlaps > 0.5 * overlaps.max()).any(dim=2)
    assert torch.equal(mask, expected)


def test_cells_inside_a_box_by_hand() -> None:
    """A cell counts if its centre lies in the box: 2.5 and 3.5 of 1.6 to 3.5, 0.5 of 0 to 1.4."""
    boxes = torch.tensor([[1.6, 0, 3.5, 1.4], [0.1, 0.1, 0.3, 0.2], [4.6, 1.0, 5.4, 2.0]])
    (mask,) = inside_box_masks([boxes], [(2, 6)], torch.zeros(3, dtype=torch.int64))
    assert mask.tolist() == [
        [True, False, True, True, False, False],  # the second box holds no centre: it has the cell around it
        [False, False, False, False, False, True],  # the third's middle falls on an edge, at 5: the cell right of it
    ]


def test_a_box_counts_on_its_level_alone() -> None:
    fine, coarse = torch.tensor([[0.0, 0, 4, 4], [4.0, 4, 8, 8]]), torch.tensor([[0.0, 0, 2, 2], [2.0, 2, 4, 4]])
    on_fine, on_coarse = inside_box_masks([fine, coarse], [(8, 8), (4, 4)], torch.tensor([1, 0]))
    assert on_fine.sum() == 16
    assert on_fine[4:, 4:].all()
    assert on_coarse.sum() == 4
    assert on_coarse[:2, :2].all()
    for mask in inside_box_masks([fine[:0], coarse[:0]], [(8, 8), (4, 4)], torch.zeros(0, dtype=torch.int64)):
        assert not mask.any()


def test_cells_inside_boxes_against_a_slow_version() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(12, 2, 2, generator=generator).sort(dim=1).values.flatten(1) * torch.tensor([9.0, 6, 9, 6])
    assigned = torch.randint(0, 2, (12,), generator=generator)
    masks = inside_box_masks([corners, corners / 2], [(6, 9), (3, 5)], assigned)
    for level, mask in enumerate(masks):
        expected = torch.zeros_like(mask)
        for (x1, y1, x2, y2), own in zip((corners / 2**level).tolist(), assigned.tolist(), strict=True):
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    across = x1 <= x + 0.5 <= x2 or x == math.floor((x1 + x2) / 2)
                    down = y1 <= y + 0.5 <= y2 or y == math.floor((y1 + y2) / 2)
                    expected[y, x] |= own == level and across and down
        assert torch.equal(mask, expected)


# ------------------------------------------------------------------------------------------------------------- pkd


def test_correlation_by_hand() -> None:
    teacher = row(1, 2, 3)
    for student, expected in ((row(10, 20, 30), 0.0), (row(3, 2, 1), 2.0), (row(1, -2, 1), 1.0)):  # r = 1, -1, 0
        assert float(pearson_loss(student, teacher, everywhere(teacher))) == pytest.approx(expected, abs=1e-5)


def test_correlation_against_numpys_kind() -> None:
    student, teacher = random_maps(0), random_maps(1)
    inside = some(student)
    expected = []
    for channel in range(3):
        pair = torch.stack([student[:, channel][inside], teacher[:, channel][inside]])
        expected.append(1 - torch.corrcoef(pair)[0, 1])
    assert float(pearson_loss(student, teacher, inside)) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- cwd


def test_channel_divergence_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2), at temperature 2: 4 KL."""
    student, teacher = row(0, 0, 99), row(2 * math.log(3), 0, -99)
    inside = torch.tensor([[[True, True, False]]])
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(channel_divergence(student, teacher, inside, 2.0)) == pytest.approx(4 * kl, rel=1e-5)


def test_channel_divergence_against_a_slow_version() -> None:
    student, teacher = random_maps(0), random_maps(1)
    inside = some(student)
    expected = 0.0
    for image in range(2):
        for channel in range(3):
            t = (teacher[image, channel][inside[image]] / 3).softmax(dim=0)
            s = (student[image, channel][inside[image]] / 3).softmax(dim=0)
            expected += 9 / 3 * float((t * (t / s).log()).sum()) / 2
    assert float(channel_divergence(student, teacher, inside, 3.0)) == pytest.approx(expected, rel=1e-4)


def test_cells_outside_have_no_share_however_low_the_others_are() -> None:
    """Softmax of (-50000, -50000) is (1/2, 1/2), whatever stands beside them."""
    inside = torch.tensor([[[True, True, False]]])
    student, teacher = row(-50000.0, -50000.0, 3.0), row(0.0, 0.0, 0.0)
    assert float(channel_divergence(student, teacher, inside, 1.0)) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- fgd


def test_object_masks_by_hand() -> None:
    """Cells that a box touches weigh 1 / their number; the smaller of two overlapping boxes decides."""
    boxes = [torch.tensor([[0.2, 0, 2.5, 1], [2.0, 0, 3, 2]]), torch.zeros(0, 4)]
    objects, background = object_masks(boxes, torch.ones(2, 2, 4, dtype=torch.bool))
    third, half = 1 / 3, 1 / 2
    torch.testing.assert_close(objects[0], torch.tensor([[third, third, half, 0], [0, 0, half, 0]]))
    torch.testing.assert_close(background[0], torch.tensor([[0, 0, 0, 0.25], [0.25, 0.25, 0, 0.25]]))
    assert not objects[1].any()
    torch.testing.assert_close(background[1], torch.full((2, 4), 1 / 8))


def test_object_masks_count_the_cells_of_the_image() -> None:
    inside = torch.tensor([[[True, True, True, False]]])
    objects, background = object_masks([torch.tensor([[2.0, 0, 4, 1]])], inside)
    assert objects.tolist() == [[[0, 0, 1, 0]]]
    assert background.tolist() == [[[0.5, 0.5, 0, 0]]]


def test_attention_by_hand() -> None:
    maps = torch.tensor([[[[0.0, -2.0]], [[0.0, 0.0]]]])  # one image, two channels, two cells
    cells, channels = attention(maps, everywhere(maps), temperature=0.5)
    odds = math.exp(1 / 0.5)  # mean absolute value 1 at the second cell, and in the first channel
    torch.testing.assert_close(cells, torch.tensor([[[2 / (1 + odds), 2 * odds / (1 + odds)]]]))
    torch.testing.assert_close(channels, torch.tensor([[2 * odds / (1 + odds), 2 / (1 + odds)]]))
    # A third cell outside the image changes neither; an image without cells has no attention over cells.
    wide, inside = torch.nn.functional.pad(maps, (0, 1), value=9.0), torch.tensor([[[True, True, False]]])
    found = attention(wide, inside, temperature=0.5)
    torch.testing.assert_close(found[0], torch.nn.functional.pad(cells, (0, 1)))
    torch.testing.assert_close(found[1], channels)
    assert attention(wide, ~torch.ones_like(inside), temperature=0.5)[0].tolist() == [[[0, 0, 0]]]


def test_focal_losses_against_a_slow_version() -> None:
    student, teacher = random_maps(0), random_maps(1)
    inside = everywhere(student)
    objects, background = object_masks([torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 1, 5, 4]])], inside)
    found = focal_losses(student, teacher, inside, objects, background, 0.5)
    expected = [0.0, 0.0, 0.0]
    attentions = []
    for maps in (student, teacher):
        at_cells, at_channels = torch.zeros(2, 4, 5), torch.zeros(2, 3)
        for n in range(2):
            raw = sum(maps[n, c].abs() for c in range(3)) / 3 / 0.5
            at_cells[n] = 20 * raw.exp() / raw.exp().sum()
            by_channel = torch.stack([maps[n, c].abs().mean() for c in range(3)]) / 0.5
            at_channels[n] = 3 * by_channel.exp() / by_channel.exp().sum()
        attentions.append((at_cells, at_channels))
    (cells_s, channels_s), (cells_t, channels_t) = attentions
    for n in range(2):
        for y in range(4):
            for x in range(5):
                for c in range(3):
                    error = (student[n, c, y, x] - teacher[n, c, y, x]) ** 2 * cells_t[n, y, x] * channels_t[n, c]
                    expected[0] += float(error * objects[n, y, x]) / 2
                    expected[1] += float(error * background[n, y, x]) / 2
    expected[2] = float((cells_s - cells_t).abs().sum() + (channels_s - channels_t).abs().sum()) / 2
    assert [float(part) for part in found] == pytest.approx(expected, rel=1e-4)


def test_global_context_against_a_slow_version() -> None:
    torch.manual_seed(0)
    blocks = (ContextBlock(3), ContextBlock(3))
    student, teacher = random_maps(0), random_maps(1)
    plain = float((student - teacher).square().sum()) / 2
    assert float(global_loss(student, teacher, everywhere(student), *blocks).detach()) == pytest.approx(plain)
    for block in blocks:  # with weights that add something
        torch.nn.init.normal_(block.transform[-1].weight)  # type: ignore[arg-type]
    through = []
    for block, maps in zip(blocks, (student, teacher), strict=True):
        out = torch.zeros_like(maps)
        for n in range(2):
            score = torch.einsum("c,chw->hw", block.attend.weight[0, :, 0, 0], maps[n]) + block.attend.bias
            share = (score - score.max()).exp()
            context = (maps[n] * share / share.sum()).sum(dim=(1, 2))
            out[n] = maps[n] + block.transform(context)[:, None, None]
        through.append(out)
    expected = float((through[0] - through[1]).detach().square().sum()) / 2
    assert float(global_loss(student, teacher, everywhere(student), *blocks).detach()) == pytest.approx(
        expected, rel=1e-4
    )


def test_published_sizes_need_no_scale() -> None:
    """800 x 1088 pixels: strides 4 to 32 of a two-stage detector, 8 to 128 of a dense one."""
    for cells, strides in ((TWO_STAGE_CELLS, (4, 8, 16, 32)), (DENSE_CELLS, (8, 16, 32, 64, 128))):
        assert cells == sum(math.ceil(800 / stride) * math.ceil(1088 / stride) for stride in strides)
        assert published_scale(256, cells, cells) == Scale(1, 1)
    assert published_scale(64, 50, 100) == Scale(4, 2)


def all_parts(student: Tensor, teacher: Tensor, box: tuple[float, float, float, float], scale: Scale) -> list[float]:
    """Objects, background, attention and global loss; a box covers the same cells of both images."""
    inside = everywhere(student)
    masks = object_masks([torch.tensor([box])] * len(student), inside)
    blocks = (ContextBlock(student.shape[1]), ContextBlock(student.shape[1]))  # fresh: they add nothing
    parts = (
        *focal_losses(student, teacher, inside, *masks, 0.5, scale),
        global_loss(student, teacher, inside, *blocks, scale),
    )
    return [float(part.detach()) for part in parts]


def scale_of(maps: Tensor) -> Scale:
    """To 256 channels and 1,000 cells."""
    return published_scale(maps.shape[1], maps.shape[-2] * maps.shape[-1], 1000)


@pytest.mark.parametrize("what", ["channels", "cells"])
def test_scaled_parts_do_not_depend_on_the_size(what: str) -> None:
    """With every channel or cell twice, scaled losses do not change and published sums double."""
    student, teacher, box = random_maps(0), random_maps(1), (1.0, 1.0, 3.0, 3.0)
    one = all_parts(student, teacher, box, scale_of(student))
    if what == "channels":
        wide_student, wide_teacher, wide_box = student.repeat(1, 2, 1, 1), teacher.repeat(1, 2, 1, 1), box
    else:
        wide_student, wide_teacher = student.repeat_interleave(2, dim=3), teacher.repeat_interleave(2, dim=3)
        wide_box = (2.0, 1.0, 6.0, 3.0)
    assert all_parts(wide_student, wide_teacher, wide_box, scale_of(wide_student)) == pytest.approx(one, rel=1e-4)
    before, after = all_parts(student, teacher, box, Scale()), all_parts(wide_student, wide_teacher, wide_box, Scale())
    grown = [b / a for a, b in zip(before, after, strict=True)]
    focal = 2.0 if what == "channels" else 1.0
    assert (grown[0], grown[1], grown[3]) == pytest.approx((focal, focal, 2.0), rel=1e-4)
    assert 1 < grown[2] < 2  # of its two sums one doubles


def test_at_the_published_size_the_scaled_parts_are_the_published_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 256, 25, 40, generator=generator) for _ in range(2))
    scale = scale_of(student)
    box = (1.0, 1.0, 9.0, 3.0)
    assert all_parts(student, teacher, box, scale) == all_parts(student, teacher, box, Scale())


def test_scaled_parts_against_a_slow_version() -> None:
    """As means, with the published sizes written out."""
    student, teacher, box = random_maps(0), random_maps(1), (1.0, 1.0, 3.0, 3.0)
    found = all_parts(student, teacher, box, scale_of(student))
    expected = [0.0, 0.0, 0.0, 0.0]
    for n in range(2):
        (cells_s, channels_s), (cells_t, channels_t) = (
            attention(maps[n : n + 1], everywhere(maps[n : n + 1]), 0.5) for maps in (student, teacher)
        )
        weighted = (student[n] - teacher[n]).square() * channels_t[0, :, None, None] * cells_t
        inside = torch.zeros(4, 5, dtype=torch.bool)
        inside[1:3, 1:3] = True
        expected[0] += 256 * float(weighted[:, inside].mean()) / 2
        expected[1] += 256 * float(weighted[:, ~inside].mean()) / 2
        expected[2] += 1000 * float((cells_s - cells_t).abs().mean()) / 2
        expected[2] += 256 * float((channels_s - channels_t).abs().mean()) / 2
        expected[3] += 256 * 1000 * float((student[n] - teacher[n]).square().mean()) / 2
    assert found == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- logit


def test_class_maps_by_hand() -> None:
    """Student 1/2 everywhere; teacher 3/4 and 1/4 in the one cell that counts."""
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[math.log(3), 50.0]], [[-math.log(3), 50.0]]]])
    total, seen = class_map_loss(student, teacher, torch.tensor([[[True, False]]]))
    assert float(total) == pytest.approx(2 * 0.25 * math.log(2))
    assert float(seen) == pytest.approx(0.75)


def test_class_maps_against_a_slow_version() -> None:
    student, teacher = random_maps(0), random_maps(1)
    inside = some(student)
    expected, best = 0.0, 0.0
    for n, y, x in inside.nonzero().tolist():
        s = [1 / (1 + math.exp(-float(v))) for v in student[n, :, y, x]]
        t = [1 / (1 + math.exp(-float(v))) for v in teacher[n, :, y, x]]
        best += max(t)
        for p, q in zip(s, t, strict=True):
            expected -= abs(p - q) * (q * math.log(p) + (1 - q) * math.log(1 - p))
    total, seen = class_map_loss(student, teacher, inside)
    assert (float(total), float(seen)) == pytest.approx((expected, best), rel=1e-4)


def test_equal_class_maps_cost_nothing() -> None:
    student = random_maps(0).requires_grad_()
    total, _ = class_map_loss(student, student.detach(), everywhere(student))
    assert float(total.detach()) == 0
