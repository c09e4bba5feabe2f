"""The dry run and ``recipe validate --deep`` find what would fail at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from PIL import Image

from gdetkd_cli.commands import check_recipe, plan_distill
from gdetkd_cli.errors import DataError, ExportError, ModelError
from gdetkd_cli.recipe.schema import Recipe

TRIES: list[Callable[[Recipe], Any]] = [plan_distill, lambda recipe: check_recipe(recipe, "toy.yaml")]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Four images; the last validation image is read only at the end of a run."""
    names = [f"{i}.png" for i in range(4)]
    toy.write_images(tmp_path / "images", names)
    for split, chosen in (("train", range(2)), ("val", range(2, 4))):
        tables = {
            "images": [{"id": i, "file_name": names[i], "width": 64, "height": 64} for i in chosen],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(toy.CLASS_NAMES)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [9, 9, 30, 30], "area": 900, "iscrowd": 0}
                for i in chosen
            ],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(tables))
    data = {"format": "coco", "root": str(tmp_path)}
    return Recipe.model_validate(toy.recipe(steps=2).model_dump(mode="json") | {"data": data})


@pytest.mark.parametrize("check", TRIES, ids=["plan", "validate"])
@pytest.mark.parametrize("harm", ["text", "size"])
def test_a_bad_validation_image_is_found(check: Callable[[Recipe], Any], harm: str, recipe: Recipe) -> None:
    check(recipe)
    image = Path(recipe.data.root) / "images" / "3.png"  # type: ignore[union-attr]
    if harm == "text":
        image.write_text("not an image")
    else:
        Image.new("RGB", (32, 64)).save(image)
    with pytest.raises(DataError, match=r"3\.png (cannot be read|should be 64 x 64 pixels)"):
        check(recipe)


def test_a_student_that_cannot_be_exported_is_noted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ExportError("an operator is missing")

    assert not any("exported" in note for note in plan_distill(recipe).notes)
    monkeypatch.setattr("gdetkd_cli.commands.rehearse.export_onnx", fail)
    assert plan_distill(recipe).notes[-1] == (
        "the student can be trained, but not exported to ONNX: an operator is missing"
    )


def test_a_student_that_fails_only_at_inference_is_found(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("an argument is missing")

    monkeypatch.setattr("gdetkd_cli.commands.rehearse.predict_split", fail)
    with pytest.raises(ModelError, match=r"fails at inference: an argument is missing; check student.arguments"):
        plan_distill(recipe)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"box_detections_per_img": "many"}, "box_detections_per_img must be a whole number of at least 1, got 'many'"),
        ({"min_size": 10**9}, "min_size must be a whole number from 1 to 16384, or a list of them, got 1000000000"),
        ({"box_score_thresh": 1.5}, r"box_score_thresh must be a number from 0 to 1, got 1\.5"),
        ({"image_std": [1, 0, 1]}, r"image_std must be 3 numbers above 0, got \[1, 0, 1\]"),
        ({"rpn_head": 3}, "rpn_head must be left out, because it is no plain number, got 3"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_refused(recipe: Recipe, arguments: dict[str, object], sentence: str) -> None:
    student = recipe.student.model_dump(mode="json")
    student["arguments"] |= arguments
    broken = recipe.model_copy(update={"student": type(recipe.student).model_validate(student)})
    with pytest.raises(ModelError, match=f"head 'faster-rcnn': {sentence}$"):
        plan_distill(broken)
