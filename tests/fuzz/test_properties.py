"""Properties of recipes, annotations, boxes and student.pt that hold for any value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as masks

from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.readers.run_lengths import is_mask
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import DataError, GDetKDError, ModelError, RecipeError
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.recipe.load import dump_recipe, load_recipe

_QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=8,
)
_HEIGHT, _WIDTH = 40, 60
_RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"format": "synthetic"},
    "student": {"arch": "composed", "backbone": "resnet18", "head": "fcos"},
    "train": {"steps": 10},
}


# ------------------------------------------------------------------------------------------------------- recipes


@_QUICK
@given(value=_PLAIN, block=st.sampled_from(["name", "seed", "data", "student", "train", "augment", "distill", "new"]))
def test_a_recipe_is_refused_or_read_back_as_written(tmp_path: Path, value: Any, block: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(_RECIPE | {block: value}, allow_unicode=True), encoding="utf-8")
    try:
        recipe = load_recipe(path)
    except RecipeError:
        return
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@_QUICK
@given(number=st.integers() | st.floats())
def test_a_number_is_taken_as_it_is_or_refused(tmp_path: Path, number: float) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(_RECIPE | {"train": {"steps": 10, "clip_norm": number}}), encoding="utf-8")
    if 0 < number <= 10**9:
        assert load_recipe(path).train.clip_norm == number
    else:
        with pytest.raises(RecipeError, match=r"train\.clip_norm: input should be"):
            load_recipe(path)


@_QUICK
@given(key=st.text(max_size=12), value=st.text(max_size=12))
def test_an_override_is_applied_or_refused(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(_RECIPE), encoding="utf-8")
    try:
        load_recipe(path, [f"{key}={value}", f"train.schedule.milestones.{key}={value}"])
    except RecipeError as error:
        assert str(error)  # noqa: PT017  # the other outcome is that the recipe is valid


# ------------------------------------------------------------------------------------------- annotations and boxes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((_HEIGHT, _WIDTH, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def _read(folder: Path, **annotation: Any) -> Any:
    tables = {
        "images": [{"id": 1, "file_name": "a.png", "height": _HEIGHT, "width": _WIDTH}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], **annotation}],
        "categories": [{"id": 1, "name": "a"}],
    }
    path = folder / "train.json"
    path.write_text(json.dumps(tables), encoding="utf-8")
    return read_coco(annotations=path, images=folder, outlines=True)


@_QUICK
@given(box=_PLAIN | st.lists(st.floats() | st.integers(), min_size=4, max_size=4))
def test_a_box_is_clipped_or_counted(images: Path, box: Any) -> None:
    split = _read(images, bbox=box)
    boxes = split.records[0].boxes
    assert len(boxes) or any("dropped: the box" in note for note in split.notes)
    assert ((boxes >= 0) & (boxes <= torch.tensor([_WIDTH, _HEIGHT] * 2))).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@_QUICK
@given(field=st.sampled_from(["image_id", "category_id", "area", "segmentation"]), value=_PLAIN)
def test_a_field_of_any_kind_is_used_or_counted(images: Path, field: str, value: Any) -> None:
    split = _read(images, **{field: value})
    assert len(split.records[0].labels) or any("dropped" in note for note in split.notes)
    assert all(math.isfinite(item["area"]) for item in split.records[0].truth)


@_QUICK
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


@_QUICK
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


@_QUICK
@given(sides=st.tuples(*[st.integers(1, 3000)] * 4))
def test_boxes_return_from_a_fitted_image(sides: tuple[int, int, int, int]) -> None:
    size, fit = sides[:2], sides[2:]
    back = ModelInput(fit=fit).to_image(torch.tensor([[0.0, 0, *fit[::-1]]]), size)
    assert (back >= 0).all()
    assert (back <= torch.tensor([size[1], size[0]] * 2)).all()


# ----------------------------------------------------------------------------------------------------- student.pt


@pytest.fixture(scope="module")
def student(
    tiny_detector: Callable[..., Detector],
    tiny_description: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("student") / "student.pt"
    catalog.save(path, tiny_detector("fcos"), tiny_description("fcos"))
    return torch.load(path, weights_only=True)


@_QUICK
@given(field=st.sampled_from(["gdetkd", "architecture", "classes", "model"]), value=_PLAIN)
def test_a_field_of_another_kind_is_refused(tmp_path: Path, student: dict[str, Any], field: str, value: Any) -> None:
    assume(not (field == "gdetkd" and value == 1 and not isinstance(value, bool)))
    assume(not (field == "classes" and isinstance(value, list) and len(value) == 3))
    torch.save(student | {field: value}, tmp_path / "s.pt")
    with pytest.raises(ModelError):
        catalog.load(tmp_path / "s.pt")


@_QUICK
@given(field=st.sampled_from(["backbone", "width", "blocks", "head", "image_size", "norm", "arguments"]), value=_PLAIN)
def test_a_description_builds_or_is_refused(student: dict[str, Any], field: str, value: Any) -> None:
    try:
        built = catalog.build(student["architecture"] | {field: value}, student["classes"])
    except GDetKDError:
        return
    assert built.class_names == tuple(student["classes"])
