"""The paper's recipes, run as they are but for size, on data of the format that each names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from PIL import Image

from gdetkd_cli.commands import plan_distill, run_train
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import ComposedDetector, Recipe

NAMES = [recipe.name for recipe in list_builtin() if recipe.name.startswith("paper/")]
TEACHERS = [name for name in NAMES if name.endswith("-teacher")]
STUDENTS = [name for name in NAMES if name not in TEACHERS]
BOX = (8, 10, 40, 50)  # xyxy in images of 96 x 64


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (96, 64), (60, 70, 90))
    image.paste((240, 30, 30), BOX)
    image.save(path)


def coco(root: Path) -> None:
    left, top, right, bottom = BOX
    outline = [left, top, right, top, right, bottom, left, bottom]
    for split in ("train", "val"):
        names = [f"{i}.jpg" for i in range(2)]
        for name in names:
            write_image(root / f"{split}2017" / name)
        box = {"bbox": [left, top, right - left, bottom - top], "category_id": 3, "segmentation": [outline]}
        tables = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"id": i, "image_id": i, **box} for i in range(2)],
            "categories": [{"id": 3, "name": "car"}, {"id": 5, "name": "dog"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tables))


def voc(root: Path) -> None:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True))
    for year, lists in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval",))):
        folder = root / year
        write_image(folder / "JPEGImages" / "a.jpg")
        for part in ("Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        text = f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
        (folder / "Annotations" / "a.xml").write_text(text)
        for name in lists:
            (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("a\n")


def bdd100k(root: Path) -> None:
    box = dict(zip(("x1", "y1", "x2", "y2"), BOX, strict=True))
    for split in ("train", "val"):
        names = [f"{i}.jpg" for i in range(2)]
        for name in names:
            write_image(root / "images" / "100k" / split / name)
        frames = [{"name": name, "labels": [{"category": "car", "box2d": box}]} for name in names]
        (root / "labels" / "det_20").mkdir(parents=True, exist_ok=True)
        (root / "labels" / "det_20" / f"det_{split}.json").write_text(json.dumps(frames))


MAKERS = {"coco": coco, "voc": voc, "bdd100k": bdd100k}


def small(name: str, data: Path, **more: Any) -> Recipe:
    """The recipe with a slim student, small images, no weights to download, and one step."""
    loaded = load_recipe(name)
    student = loaded.student
    assert isinstance(student, ComposedDetector)
    two_stage = student.head.endswith("rcnn")
    slim = {
        "width": 16,  # 64 groups of a ResNeXt need as much
        "blocks": [1, 1, 1, 1],
        "backbone_weights": None,
        "pyramid_channels": 16,
        "image_size": [64, 96],
        "arguments": toy.SMALL if two_stage else {},
    }
    made = loaded.model_dump()
    made["student"] |= slim
    made["data"]["root"] = data
    made["train"] |= {"steps": 1, "batch_size": 2, "reference_batch": 2, "evaluate_every": None}
    if made["augment"]["multi_scale"]:
        made["augment"]["multi_scale"] = [48, 64]
    made["runtime"] |= {"threads": 1, "workers": 0, "device": "cpu"}
    return Recipe.model_validate(made | more)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper")
    for name, make in MAKERS.items():
        (root / name).mkdir()
        make(root / name)
    return root


@pytest.fixture(scope="module")
def teachers(sets: Path) -> dict[str, Path]:
    """Every teacher's recipe, run."""
    return {
        name: run_train(small(name, sets / format_of(name)), output=sets / "runs" / name.replace("/", "-")).run
        for name in TEACHERS
    }


def format_of(name: str) -> str:
    return name.removeprefix("paper/").split("-")[0]


def test_what_there_is() -> None:
    assert {format_of(name) for name in NAMES} == set(MAKERS)
    assert len(STUDENTS) == 10
    for name in NAMES:
        recipe = load_recipe(name)
        assert recipe.train.reference_batch == 16
        assert recipe.data.format == format_of(name)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_learns_from_the_teacher_that_its_recipe_names(
    name: str, sets: Path, teachers: dict[str, Path]
) -> None:
    named = load_recipe(name).teacher
    assert named is not None and named.arch == "checkpoint"
    teacher = teachers[f"paper/{Path(named.path).name.removeprefix('paper-')}"]  # a run's folder has its recipe's name
    plan = plan_distill(small(name, sets / format_of(name), teacher=named.model_copy(update={"path": str(teacher)})))
    computed = {term.name for term in plan.terms if term.weight is not None}
    two_stage = "frcnn" in name or "cascade" in name
    assert computed == {"sgfi", "ckd"} | ({"class_kd", "box_kd"} if two_stage else set())
    assert computed < set(plan.losses)
