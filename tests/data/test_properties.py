"""Properties that hold for every annotation and every box, on inputs that hypothesis makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as masks

from gdetkd_cli.data.readers.coco import build_split_from_tables, read_coco
from gdetkd_cli.data.readers.run_lengths import is_mask
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.errors import DataError
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.structures import Frame

WIDTH, HEIGHT = 24, 16

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
numbers = st.integers(-60, 60) | st.floats(-60, 60, allow_subnormal=False)
boxes_xywh = st.tuples(numbers, numbers, numbers, numbers).map(list)
annotations = st.fixed_dictionaries(
    {"image_id": st.sampled_from([1, 2, 9]), "category_id": st.sampled_from([4, 5, 9]), "bbox": boxes_xywh | anything},
    optional={"iscrowd": st.sampled_from([0, 1]) | anything, "area": anything, "segmentation": anything},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    return folder


def build_tables(listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": name} for i, name in ((1, "a.png"), (2, "b.png"))],
        "annotations": listed,
        "categories": [{"id": 5, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


@given(listed=st.lists(annotations, max_size=6))
def test_every_annotation_is_kept_or_counted_and_kept_boxes_lie_in_the_image(
    folder: Path, listed: list[dict[str, Any]]
) -> None:
    split = build_split_from_tables(build_tables(listed), source=Path("x.json"), images=folder, outlines=True)
    dropped = sum(int(note.split()[0]) for note in split.notes if re.match(r"\d+ annotations? dropped", note))
    assert dropped + sum(len(record.truth) for record in split.records) == len(listed)
    for record in split.records:
        assert len(record.boxes) == len(record.labels) == len(record.outlines)
        assert len(record.boxes) == sum(not item["iscrowd"] for item in record.truth)
        assert (record.boxes[:, :2] >= 0).all() and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert (record.boxes[:, 2:] <= torch.tensor([WIDTH, HEIGHT])).all()
        assert set(record.labels.tolist()) <= {1, 2}


@given(content=anything | st.fixed_dictionaries(dict.fromkeys(("images", "annotations", "categories"), anything)))
def test_any_json_is_a_data_set_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    file = tmp_path_factory.mktemp("json") / "train.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(file))):
        read_coco(annotations=file, images=file.parent)


inside = st.tuples(st.integers(0, 20), st.integers(0, 12), st.integers(1, 24), st.integers(1, 16)).filter(
    lambda box: box[0] + box[2] <= WIDTH and box[1] + box[3] <= HEIGHT
)


@given(boxes=st.lists(inside, min_size=1, max_size=5))
def test_boxes_inside_the_image_are_read_exactly(folder: Path, boxes: list[tuple[int, ...]]) -> None:
    listed = [{"image_id": 1, "category_id": 5, "bbox": list(box)} for box in boxes]
    split = build_split_from_tables(build_tables(listed), source=Path("x.json"), images=folder)
    assert split.records[0].boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in boxes]
    assert [item["bbox"] for item in split.records[0].truth] == [list(map(float, box)) for box in boxes]


@given(boxes=st.lists(inside, max_size=5))
def test_two_flips_change_nothing(boxes: list[tuple[int, ...]]) -> None:
    flip = build_augmentation(flip=1.0, photometric=False, multi_scale=None, max_size=100)
    image = torch.arange(3 * HEIGHT * WIDTH).reshape(3, HEIGHT, WIDTH).to(torch.uint8)
    given_boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32).reshape(-1, 4)
    labels = torch.arange(len(boxes))
    once = flip(image, given_boxes, labels)
    assert torch.equal(once[1][:, [0, 2]], WIDTH - given_boxes[:, [2, 0]])
    twice = flip(*once)
    assert all(torch.equal(a, b) for a, b in zip(twice, (image, given_boxes, labels), strict=True))


@given(boxes=st.lists(inside, min_size=1, max_size=5), side=st.integers(8, 64))
def test_a_resize_moves_boxes_with_their_pixels(boxes: list[tuple[int, ...]], side: int) -> None:
    resize = build_augmentation(flip=0.0, photometric=False, multi_scale=[side], max_size=1000)
    before = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32)
    image, after, labels = resize(torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8), before, torch.arange(len(boxes)))
    scale = torch.tensor([image.shape[2] / WIDTH, image.shape[1] / HEIGHT]).repeat(2)
    expected = before * scale
    kept = (expected[:, 2:] - expected[:, :2] >= 1).all(dim=1)
    assert torch.equal(labels, torch.arange(len(boxes))[kept])
    assert torch.allclose(after, expected[kept], atol=1e-4)


coordinates = st.floats(-2000, 2000, width=32)


@given(
    box=st.tuples(*[coordinates] * 4),
    scale=st.tuples(*[st.floats(0.25, 4, width=32)] * 2),
    shift=st.tuples(*[coordinates] * 2),
)
def test_a_frame_converts_there_and_back(
    box: tuple[float, ...], scale: tuple[float, ...], shift: tuple[float, ...]
) -> None:
    frame = Frame(scale=torch.tensor([scale]), shift=torch.tensor([shift]), size=(64, 64))
    boxes, index = torch.tensor([box]), torch.tensor([0])
    assert torch.allclose(frame.to_image(frame.to_model(boxes, index), index), boxes, atol=0.02)


@given(data=st.data())
def test_run_lengths_cover_the_image_or_are_refused(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    pixels = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.asfortranarray(np.array(pixels, dtype=np.uint8).reshape(height, width))
    counts = masks.encode(mask)["counts"].decode()
    assert is_mask({"size": [height, width], "counts": counts}, (height, width))
    assert not is_mask({"size": [height, width + 1], "counts": counts}, (height, width + 1))
    assert not is_mask({"size": [height, width], "counts": counts + "1"}, (height, width))
    broken = data.draw(st.text(max_size=12) | st.lists(st.integers(-3, 200), max_size=6))
    whole = isinstance(broken, list) and sum(broken) == height * width and min(broken, default=0) >= 0
    if isinstance(broken, list):
        assert is_mask({"size": [height, width], "counts": broken}, (height, width)) == whole


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    scales=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    limit=st.integers(1, 400),
)
def test_multi_scale_keeps_pixels_or_refuses(height: int, width: int, scales: list[int], limit: int) -> None:
    change = build_augmentation(flip=0.5, photometric=False, multi_scale=scales, max_size=limit)
    boxes = torch.tensor([[0.0, 0, width, height]])
    try:
        image, found, labels = change(torch.zeros(3, height, width, dtype=torch.uint8), boxes, torch.ones(1))
    except DataError:
        assert max(height, width) > limit * min(height, width) or min(limit, *scales) == 1
        return
    assert min(image.shape) >= 1
    assert len(found) == len(labels)
    assert (found <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()


@given(sides=st.tuples(*[st.integers(1, 3000)] * 4))
def test_boxes_return_from_a_fitted_image(sides: tuple[int, int, int, int]) -> None:
    size, fit = sides[:2], sides[2:]
    back = ModelInput(fit=fit).to_image(torch.tensor([[0.0, 0, *fit[::-1]]]), size)
    assert (back >= 0).all()
    assert (back <= torch.tensor([size[1], size[0]] * 2)).all()
