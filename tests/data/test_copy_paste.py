"""Copies of objects: their positions, the objects that they hide, and their boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from gdetkd_cli.data.copy_paste import _draw_mask, paste_copies
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.readers.coco import read_coco

BOX = torch.tensor([[40.0, 30, 60, 42]])
LABEL = torch.tensor([2])


def scene() -> Tensor:
    """(3, 80, 120), dark; the object is red."""
    image = torch.full((3, 80, 120), 20, dtype=torch.uint8)
    image[0, 30:42, 40:60] = 220
    return image


def red(image: Tensor) -> Tensor:
    return image[0] > 120


@pytest.mark.parametrize("seed", range(8))
def test_copy_is_near_its_object_and_fits_its_box(seed: int) -> None:
    image = scene()
    torch.manual_seed(seed)
    polygon = np.array([40, 30, 60, 30, 60, 42, 40, 42], dtype=np.float32)
    pasted, boxes, labels = paste_copies(image, BOX, LABEL, [[polygon]], probability=1.0)
    assert torch.equal(image, scene())  # the input is unchanged
    assert labels.tolist() == [2] * len(boxes)
    x1, y1, x2, y2 = (int(v) for v in boxes[-1])
    assert 16 <= x2 - x1 <= 24
    assert 9 <= y2 - y1 <= 15
    assert abs((x1 + x2) / 2 - 50) <= 1.5 * 20 + 1
    assert abs((y1 + y2) / 2 - 36) <= 1.5 * 12 + 1
    assert red(pasted)[y1:y2, x1:x2].float().mean() > 0.95
    outside = red(pasted)
    outside[y1:y2, x1:x2] = False
    outside[30:42, 40:60] = False
    assert not outside.any()


def test_a_copy_shows_its_own_object_even_where_another_copy_lies() -> None:
    """Two objects side by side; a copy of the first often covers the second, before that is copied."""
    image = torch.full((3, 80, 120), 20, dtype=torch.uint8)
    image[0, 30:42, 40:60], image[1, 30:42, 60:80] = 220, 220
    boxes, labels = torch.tensor([[40.0, 30, 60, 42], [60, 30, 80, 42]]), torch.tensor([1, 2])
    outlines = [[np.array([x, 30, x + 20, 30, x + 20, 42, x, 42], dtype=np.float32)] for x in (40, 60)]
    for seed in range(60):
        torch.manual_seed(seed)
        pasted, found, names = paste_copies(image, boxes, labels, outlines, probability=1.0)
        assert names[-1] == 2  # the last copy lies above all others
        x1, y1, x2, y2 = (int(v) for v in found[-1])
        assert pasted[1, y1:y2, x1:x2].float().mean() > 200


def test_hidden_objects_are_dropped() -> None:
    boxes, labels = torch.cat([BOX, torch.tensor([[44.0, 33, 50, 38]])]), torch.tensor([2, 1])
    hidden = kept = 0
    for seed in range(300):
        torch.manual_seed(seed)
        _, _, names = paste_copies(scene(), boxes, labels, (), probability=0.5)
        hidden += 1 not in names.tolist()
        kept += {1, 2} <= set(names.tolist())
    assert hidden > 0
    assert kept > 100


def test_probability() -> None:
    torch.manual_seed(0)
    assert len(paste_copies(scene(), BOX, LABEL, (), probability=0.0)[1]) == 1
    pasted = sum(len(paste_copies(scene(), BOX, LABEL, (), probability=0.25)[1]) > 1 for _ in range(200))
    assert 32 <= pasted <= 68  # some copies hide their object: 50 +- 3 standard deviations


def test_only_the_outline_is_pasted() -> None:
    """A triangle in a box: its outer corner is not copied, neither with a polygon nor with run lengths."""
    triangle = np.array([40, 30, 60, 30, 40, 42], dtype=np.float32)
    drawn = np.zeros((80, 120), dtype=np.uint8)
    for y in range(30, 42):
        drawn[y, 40 : 40 + round(20 * (42 - y) / 12)] = 1
    runs = rle.encode(np.asfortranarray(drawn))
    solid = []
    outlines: list[Any] = [[triangle], runs, None]
    for outline in outlines:
        torch.manual_seed(5)
        pasted, boxes, _ = paste_copies(scene(), BOX, LABEL, [outline], probability=1.0)
        new = red(pasted) & ~red(scene())
        x1, y1, x2, y2 = (int(v) for v in boxes[-1])
        solid.append(float(new.sum()) / ((x2 - x1) * (y2 - y1)))
    assert solid[0] == pytest.approx(0.5, abs=0.1)
    assert solid[1] == pytest.approx(0.5, abs=0.1)
    assert solid[2] > 0.75


def test_a_polygon_is_drawn_as_coco_draws_it() -> None:
    """A square of 10 x 10 pixels, and a triangle above its diagonal: no background beyond the edges comes along."""
    square = np.array([10, 10, 20, 10, 20, 20, 10, 20], dtype=np.float32)
    drawn = _draw_mask([square], (30, 40))
    assert drawn.sum() == drawn[10:20, 10:20].sum() == 100
    triangle = np.array([0, 0, 20, 0, 20, 20], dtype=np.float32)
    assert float(_draw_mask([triangle], (30, 40)).sum()) == pytest.approx(200, abs=11)
    assert _draw_mask([square, triangle], (30, 40)).max() == 1


def test_nothing_to_paste() -> None:
    image, boxes, labels = paste_copies(scene(), torch.zeros(0, 4), LABEL[:0], (), probability=1.0)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)
    assert torch.equal(image, scene())
    thin = torch.tensor([[4.0, 4, 5, 30]])
    assert len(paste_copies(scene(), thin, LABEL, (), probability=1.0)[1]) == 1


def test_data_set_pastes_reproducibly(tmp_path: Path) -> None:
    Image.fromarray(scene().permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    segmentation = [[40, 30, 60, 30, 60, 42, 40, 42]]
    tables = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [40, 30, 20, 12], "segmentation": segmentation},
            {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": "none", "iscrowd": 0},
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 99, 70], "segmentation": {}, "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(tables))
    plain = read_coco(annotations=tmp_path / "train.json", images=tmp_path)
    assert plain.records[0].outlines == ()
    split = read_coco(annotations=tmp_path / "train.json", images=tmp_path, outlines=True)
    outline, nothing = split.records[0].outlines  # the crowd is not for training
    assert nothing is None
    assert isinstance(outline, list)
    assert outline[0].tolist() == segmentation[0]
    dataset = DetectionDataset(split=split, augmentation=None, seed=3, cache_mb=1, copy_paste=1.0)
    first, again, other = dataset[0, 0], dataset[0, 0], dataset[1, 0]
    assert len(first[1].boxes) > 2
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].boxes, again[1].boxes)
    assert not torch.equal(first[0], other[0])
