"""A recipe from a teacher, a student and a folder of data."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from PIL import Image
from twins import TwoWay

from gdetkd_cli.assembly.find_data import find_block, find_data
from gdetkd_cli.commands import check_recipe, plan_distill, run_init, run_probe_to_recipe, run_train
from gdetkd_cli.commands.probe import ProbeOptions
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.events import silent
from gdetkd_cli.errors import DataError, ModelError, RecipeError
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import (
    Bdd100kData,
    CheckpointDetector,
    ComposedDetector,
    FolderData,
    ModelInput,
    VocData,
    YoloData,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        Image.new("RGB", (96, 64), (90, 30, 60)).save(root / "images" / name)
    box = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [8, 8, 30, 40], "area": 1200, "iscrowd": 0}
    for split, kept in (("train", names[:3]), ("val", names[3:])):
        tables = {
            "images": [{"id": i, "file_name": name, "width": 96, "height": 64} for i, name in enumerate(kept)],
            "annotations": [box],
            "categories": [{"id": 7, "name": "cell"}],
        }
        (root / f"{split}.json").write_text(json.dumps(tables))
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(run_train(toy.recipe(steps=1), output=tmp_path_factory.mktemp("init") / "teacher").run)


def test_the_recipe_runs_as_it_is(data: Path, teacher: str, tmp_path: Path) -> None:
    path = tmp_path / "recipes" / "mine.yaml"
    result = run_init(teacher, "resnet18+retinanet", data, output=path)

    recipe = load_recipe(str(path), ())
    assert isinstance(recipe.student, ComposedDetector)
    assert (recipe.student.backbone, recipe.student.head) == ("resnet18", "retinanet")
    assert recipe.student.image_size == (64, 96)
    assert isinstance(recipe.teacher, CheckpointDetector)
    assert recipe.teacher.path == teacher
    assert recipe.train.steps == 1000
    assert result.pair == "heterogeneous"
    assert [term.name for term in result.terms if term.weight is not None] == ["sgfi", "ckd"]
    text = path.read_text()
    assert "# A heterogeneous pair." in text
    assert "#   backbone.0: 256 channels, stride 8" in text
    assert "#   backbone.0: 16 channels, stride 6.095" in text
    assert "# class_kd: left out, " in text
    assert "backbone_weights: DEFAULT\nstudent:" in text
    assert "# 1333 epochs.\ntrain:" in text  # 1,000 steps of 4, of 3 images
    assert check_recipe(recipe, str(path)).terms == result.terms
    plan = plan_distill(recipe)
    assert (plan.train_images, plan.val_images) == (3, 1)


def test_images_alone_are_labelled_by_the_teacher(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    run_init("builtin:shapes-teacher", "resnet18+retinanet", data / "images", output=path)

    recipe = load_recipe(str(path), ())
    assert recipe.data == FolderData(format="folder", root=data / "images")
    plan = check_recipe(recipe, str(path))
    assert plan.student.classes == plan.teacher.classes
    assert len(plan.student.classes) == 9


def test_bdd100k_is_recognised(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "bdd"
    (root / "labels" / "det_20").mkdir(parents=True)
    corners = {"x1": 8, "y1": 8, "x2": 38, "y2": 48}
    for split, image in (("train", "0.png"), ("val", "3.png")):
        folder = root / "images" / "100k" / split
        folder.mkdir(parents=True)
        (data / "images" / image).rename(folder / image)
        frames = [{"name": image, "labels": [{"category": "car", "box2d": corners}]}]
        (root / "labels" / "det_20" / f"det_{split}.json").write_text(json.dumps(frames))

    assert find_data(root, silent)[0] == Bdd100kData(format="bdd100k", root=root)


def test_yolo_is_recognised(data: Path, teacher: str, tmp_path: Path) -> None:
    root = tmp_path / "roboflow"
    for split, image in (("train", "0.png"), ("valid", "3.png")):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        (data / "images" / image).rename(root / split / "images" / image)
        (root / split / "labels" / f"{Path(image).stem}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['car']\n")
    run_init(teacher, "resnet18+fcos", root, output=tmp_path / "mine.yaml")
    assert load_recipe(str(tmp_path / "mine.yaml"), ()).data == YoloData(format="yolo", root=root)

    (root / "valid").rename(root / "elsewhere")  # as an export without a validation split
    (root / "elsewhere" / "images" / "3.png").rename(root / "train" / "images" / "3.png")
    notes: list[str] = []
    assert find_data(root, lambda e: notes.append(str(e)))[0] == YoloData(format="yolo", root=root, val=None)
    assert any("every tenth image is held out" in note for note in notes)


def test_annotations_of_another_format_are_not_passed_over(data: Path, teacher: str, tmp_path: Path) -> None:
    for number in range(3):
        (data / "images" / f"{number}.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(DataError, match=r"annotations in an unsupported format \(0\.txt and others\); convert"):
        run_init(teacher, "resnet18+fcos", data / "images", output=tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", "[1,2", r"train\.json should be COCO detection JSON, but it cannot be read \("),
        (
            "sub/labels.json",
            json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "box": [1, 2]}]}),
            "but its images have no file_name, or its annotations no bbox; correct the file",
        ),
        ("labels.json", '{"annotations": []}', "but it has no lists named images;"),
        ("train.json", "{}", "but it has no lists named images and annotations;"),
        ("labels/train/0.txt", "0 0.5 0.5 1e-1 1\n", "annotations in an unsupported format"),
        ("Annotations/0.xml", "<annotation><object/></annotation>", "annotations in an unsupported format"),
        ("meta.json", '{"camera": 3}', None),
        ("train_settings.json", "{}", None),
        ("0.txt", "five words that say something", None),
    ],
)
def test_annotations_that_cannot_be_used_are_not_passed_over(
    file: str, content: str, message: str | None, tmp_path: Path
) -> None:
    toy.write_images(tmp_path / "images", [f"{number}.png" for number in range(9)])
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    if message is None:
        assert isinstance(find_block(tmp_path), FolderData)
    else:
        with pytest.raises(DataError, match=message):
            find_block(tmp_path)


def test_a_retinanet_that_starts_afresh_can_learn(data: Path, teacher: str, tmp_path: Path) -> None:
    notes: list[str] = []
    output = tmp_path / "r.yaml"
    run_init(teacher, "resnet18+retinanet", data, output=output, observer=lambda event: notes.append(str(event)))
    assert any("its body has fresh weights" in note for note in notes)
    assert any(
        "the teacher does not know 1 of the data's 1 classes (cell): it teaches by its features" in note
        for note in notes
    )
    student = load_recipe(tmp_path / "r.yaml").student
    assert isinstance(student, ComposedDetector) and student.arguments == {"head_norm": True}


def test_a_file_name_that_no_run_may_have(data: Path, teacher: str, tmp_path: Path) -> None:
    run_init(teacher, "resnet18+fcos", data, output=tmp_path / "my recipe (2).yaml")
    assert load_recipe(str(tmp_path / "my recipe (2).yaml"), ()).name == "my-recipe-2"


def test_a_recipe_from_a_probe(teacher: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(TwoWay().eval(), torch.rand(1, 3, 64, 96)).save(tmp_path / "traced.pt")
    options = ProbeOptions(
        size=(64, 96), scale=255.0, mean=(1.0, 2.0, 3.0), bgr=True, levels=("silu:1", "silu:2"), classes=("cat", "dog")
    )
    report = run_probe_to_recipe(str(tmp_path / "traced.pt"), options, path)

    recipe = load_recipe(str(path), ())
    assert isinstance(recipe.teacher, CheckpointDetector)
    assert recipe.teacher.classes == ["cat", "dog"] == list(report.classes)
    assert recipe.teacher.levels == ["silu:1", "silu:2"] == [level.name for level in report.levels]
    assert recipe.teacher.input == ModelInput.model_validate(
        {"size": [64, 96], "range": "0-255", "mean": [1, 2, 3], "channels": "bgr"}
    )
    assert isinstance(recipe.student, ComposedDetector)
    assert recipe.student.head == "fcos"
    with pytest.raises(RecipeError, match=r"odd\.yaml already exists; choose another file with --recipe"):
        run_probe_to_recipe(teacher, ProbeOptions(), path)


def test_the_users_names_of_a_teachers_classes(data: Path, teacher: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    names = tuple(catalog.load(catalog.locate(teacher)).detector.class_names)
    run_init(teacher, "resnet18+fcos", data, output=path, classes=names[::-1])
    recipe = load_recipe(str(path), ())
    assert isinstance(recipe.teacher, CheckpointDetector)
    assert recipe.teacher.classes == list(names[::-1])
    with pytest.raises(RecipeError, match="fcos_resnet50_fpn is no file, so remove it"):
        run_init("fcos_resnet50_fpn", "resnet18+fcos", data, output=tmp_path / "no.yaml", classes=names)
    with pytest.raises(ModelError, match=rf"has {len(names)} classes .*, but 1 are named"):
        run_probe_to_recipe(teacher, ProbeOptions(size=(64, 64), classes=("cat",)), tmp_path / "no.yaml")


def test_names_of_classes_add_no_line_to_a_recipe(tmp_path: Path, tiny_detector: Any, tiny_description: Any) -> None:
    file = tmp_path / "evil.pt"
    evil = "cat\nseed: 7\nname: evil\x1b[2J"
    catalog.save(file, tiny_detector("fcos", classes=(evil,)), tiny_description("fcos"))
    run_probe_to_recipe(str(file), ProbeOptions(size=(64, 64)), tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml").seed == 0
    assert r"# classes: cat\nseed: 7\nname: evil\x1b[2J" in (tmp_path / "mine.yaml").read_text().splitlines()


def test_names_that_look_like_numbers_stay_names(tmp_path: Path, tiny_detector: Any, tiny_description: Any) -> None:
    names = ("1e3", "010", "cat")
    catalog.save(tmp_path / "t.pt", tiny_detector("fcos", classes=names), tiny_description("fcos"))
    run_probe_to_recipe(str(tmp_path / "t.pt"), ProbeOptions(size=(64, 64), classes=names), tmp_path / "mine.yaml")
    teacher = load_recipe(tmp_path / "mine.yaml").teacher
    assert isinstance(teacher, CheckpointDetector) and teacher.classes == list(names)


def test_nothing_is_overwritten(data: Path, teacher: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(RecipeError, match=r"mine\.yaml already exists; choose another file with --output"):
        run_init(teacher, "resnet18+fcos", data, output=path)
    assert path.read_text() == "mine"


def test_a_student_that_is_nothing(data: Path, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"unknown detector 'small'; expected a file, .* or BACKBONE\+HEAD, where HEAD is one of"
    ):
        run_init(teacher, "small", data, output=tmp_path / "mine.yaml")
    with pytest.raises(ModelError, match=r"did you mean resnet18\+retinanet\?$"):
        run_init(teacher, "resnet18+retinannet", data, output=tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_folder_of_voc_s_layout(tmp_path: Path) -> None:
    root = tmp_path / "labelled"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    box = "<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>38</xmax><ymax>48</ymax></bndbox>"
    for stem in ("a", "b"):
        Image.new("RGB", (96, 64), (90, 30, 60)).save(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><object><name>cell</name>{box}</object></annotation>"
        )
    for split, stem in (("train", "a"), ("val", "b"), ("trainval", "a")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{stem}\n")
    data, _ = find_data(root, silent)
    assert isinstance(data, VocData) and data.val is not None
    assert [str(p) for p in (*data.train, *data.val)] == ["ImageSets/Main/train.txt", "ImageSets/Main/val.txt"]
    assert data.classes == ["cell"]  # none of VOC's twenty
