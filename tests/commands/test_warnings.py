"""What can be used but is probably a mistake is a warning, once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli.assembly import build_detector
from gdetkd_cli.commands import check_recipe, plan_distill, run_eval, run_export
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe, SyntheticData

BAD = (
    "warning: 1 of its weight tensors contain NaN or infinity (backbone.body.conv1.weight first), so its results are "
    "meaningless; use an earlier checkpoint"
)
DATA = SyntheticData(val_images=2, size=64)


class Warnings(list[str]):
    """An observer that keeps the notes with a warning."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note) and "warning: " in event.text:
            self.append(event.text)


@pytest.fixture(scope="module")
def spoilt(
    tiny_detector: Callable[..., Any], tiny_description: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A student.pt and its exported files, with one infinite weight."""
    detector = tiny_detector("fcos", classes=toy.CLASS_NAMES)
    with torch.no_grad():
        detector.module.backbone.body.conv1.weight[0, 0, 0, 0] = torch.inf
    file = tmp_path_factory.mktemp("spoilt") / "student.pt"
    catalog.save(file, detector, tiny_description("fcos"))
    found = Warnings()
    run_export(str(file), onnx=True, torchscript=True, output=None, observer=found)
    assert found[0] == BAD
    assert (
        found[1:] == ["warning: the detector detects nothing in the parity images, so the comparison proves little"] * 2
    )
    return file


@pytest.mark.parametrize("name", ["student.pt", "student.onnx", "student.torchscript"])
def test_weights_that_are_not_finite(spoilt: Path, name: str) -> None:
    found = Warnings()
    run_eval(str(spoilt.with_name(name)), data=DATA, observer=found)
    assert len(found) == 1
    assert "1 of its weight tensors contain NaN or infinity" in found[0]
    teacher = CheckpointDetector(arch="checkpoint", path=str(spoilt))
    assert build_detector(teacher, toy.CLASS_NAMES, 0, keep_classes=True).notes == (BAD,)


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., Recipe]:
    """(objects, repeat) -> a recipe of four images, with or without objects and with a repeated image."""

    def write(*, objects: bool = True, repeat: str = "") -> Recipe:
        toy.write_coco(tmp_path, [f"{i}.png" for i in range(4)], train=(0, 1), objects=objects)
        images = tmp_path / "images"
        if repeat == "copy":
            shutil.copy(images / "0.png", images / "3.png")
        if repeat == "link":
            (images / "3.png").unlink()
            (images / "3.png").symlink_to(images / "0.png")
        data = {"format": "coco", "root": str(tmp_path)}
        return Recipe.model_validate(toy.recipe(steps=1).model_dump(mode="json") | {"data": data})

    return write


def list_warnings(recipe: Recipe) -> list[str]:
    """The warnings of ``recipe validate --deep``, which are also those of the dry run."""
    found = Warnings()
    check_recipe(recipe, "toy.yaml", observer=found)
    assert [note for note in plan_distill(recipe).notes if "warning: " in note] == found
    return found


def test_good_data_and_detectors_have_no_warning(coco: Callable[..., Recipe]) -> None:
    assert list_warnings(coco()) == []


def test_no_usable_object(coco: Callable[..., Recipe]) -> None:
    train, val = list_warnings(coco(objects=False))
    assert "train.json has a usable object, so the student learns only background; check" in train
    assert "val.json has a usable object, so there is no AP; check" in val


@pytest.mark.parametrize("repeat", ["copy", "link"])
def test_a_validation_image_that_is_a_training_image(coco: Callable[..., Recipe], repeat: str, tmp_path: Path) -> None:
    assert list_warnings(coco(repeat=repeat)) == [
        f"warning: 1 of 2 validation images are training images, too ({tmp_path / 'images' / '3.png'} first), so the "
        "AP is too high; remove them from one split"
    ]


def test_a_student_larger_than_its_teacher(coco: Callable[..., Recipe]) -> None:
    recipe = coco()
    wide = Recipe.model_validate(recipe.model_dump(mode="json") | {"student": toy.detector(width=24)})
    (warning,) = list_warnings(wide)
    assert "M parameters, more than the teacher's" in warning
