"""Images without annotations: the teacher's detections are the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from PIL import ExifTags, Image

from gdetkd_cli.assembly.data import SPLITS, build_split, read_unlabelled_split
from gdetkd_cli.assembly.labels import describe_labels, label_data, label_split, write_labels
from gdetkd_cli.commands import plan_distill, run_distill, run_eval, run_train
from gdetkd_cli.commands.train import resume_run
from gdetkd_cli.data.readers.folder import read_folder
from gdetkd_cli.errors import DataError
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.schema import (
    CheckpointDetector,
    CocoData,
    Distill,
    FolderData,
    Recipe,
    TeacherLabels,
    YoloData,
)
from gdetkd_cli.structures import Detections

CPU = torch.device("cpu")
TEACHER = CheckpointDetector(arch="checkpoint", path="builtin:shapes-teacher")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, two of them deeper, and a file that is none."""
    root: Path = tmp_path_factory.mktemp("images")
    toy.write_images(root, [*(f"{i:02}.png" for i in range(10)), "more/10.jpg", "more/11.jpg"])
    (root / "notes.txt").write_text("nothing")
    return root


def recipe(folder: Path, *, steps: int = 2, **data: Any) -> Recipe:
    block = {"format": "folder", "root": folder, **data}
    changed = {"data": FolderData.model_validate(block), "teacher": TEACHER}
    return toy.recipe(steps=steps, checkpoint_every=1).model_copy(update=changed)


def test_every_tenth_image_is_for_validation(folder: Path) -> None:
    parts = {which: read_folder(folder, which) for which in ("train", "val", "all")}  # type: ignore[arg-type]

    names = {which: [p.relative_to(folder).as_posix() for p in split.read.paths] for which, split in parts.items()}  # type: ignore[attr-defined]
    assert names["all"] == [*(f"{i:02}.png" for i in range(10)), "more/10.jpg", "more/11.jpg"]
    assert names["val"] == ["00.png", "more/10.jpg"]
    assert names["train"] == [name for name in names["all"] if name not in names["val"]]
    assert parts["val"].records[0].size == (64, 64)
    assert parts["val"].read(0).shape == (3, 64, 64)
    with pytest.raises(DataError, match="there is no folder"):
        read_folder(folder / "absent")
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="has 0 images; expected at least 2"):
        read_folder(folder / "empty", "train")


class Says:
    """A teacher that always detects the same."""

    class_names = ("cat", "dog", "bird")

    def check_detects(self) -> None:
        """They can be read."""

    def predict(self, images: list[torch.Tensor]) -> list[Detections]:
        boxes = torch.tensor([[1.0, 2, 21, 42], [5, 5, 15, 10], [30, 30, 80, 60]])
        return [Detections(boxes, torch.tensor([0.9, 0.6, 0.4]), torch.tensor([3, 1, 1])) for _ in images]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ("teacher", None, [("bird", [1, 2, 20, 40]), ("cat", [5, 5, 10, 5])]),
        ({"score": 0.3}, ["cat"], [("cat", [5, 5, 10, 5]), ("cat", [30, 30, 34, 30])]),  # clipped to the image
        (
            {"score": 0.3, "per_class": {"cat": 0.5}},
            ["bird", "cat"],
            [("bird", [1, 2, 20, 40]), ("cat", [5, 5, 10, 5])],
        ),
    ],
)
def test_labels_by_hand(folder: Path, labels: Any, classes: list[str] | None, expected: list[Any]) -> None:
    data = FolderData.model_validate({"format": "folder", "root": folder, "labels": labels, "classes": classes})
    split = read_folder(folder)
    teacher: Any = Says()
    if classes:
        split = replace(split, class_names=tuple(classes))
    found = label_split(split, data, teacher, device=CPU, most=3)

    assert len(found.split) == 3
    assert found.split.class_names == tuple(classes or Says.class_names)
    for record in found.split.records:
        names = [found.split.class_names[label - 1] for label in record.labels]
        xywh = torch.cat([record.boxes[:, :2], record.boxes[:, 2:] - record.boxes[:, :2]], dim=1)
        assert list(zip(names, xywh.tolist(), strict=True)) == expected
    assert found.tables["images"][0]["file_name"] == "00.png"


def test_mixed_labels_keep_annotations(tmp_path: Path) -> None:
    toy.write_images(tmp_path / "images", ["a.png", "b.png", "c.png", "d.png"])
    box = {"image_id": 2, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 0}
    tables = {
        "images": [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("abcd", start=1)],
        "annotations": [box, {**box, "image_id": 4, "iscrowd": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "bird"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(tables))
    teacher: Any = Says()
    for labels in ("mixed", {"images": "unlabelled"}):
        data = CocoData.model_validate({"format": "coco", "root": tmp_path, "labels": labels})
        found = label_split(read_unlabelled_split(data, "train"), data, teacher, device=CPU)
        assert [record.labels.tolist() for record in found.split.records] == [[2, 1], [1], [2, 1], []]
        assert found.split.records[1].boxes.tolist() == [[1, 1, 10, 10]]
        assert [item["iscrowd"] for item in found.split.records[3].truth] == [1]
        assert [image["file_name"] for image in found.tables["images"]] == ["a.png", "b.png", "c.png", "d.png"]
        assert describe_labels(found).endswith("4 images, 2 annotated, 5 objects (cat 3, bird 2)")
    strict = data.model_copy(update={"labels": TeacherLabels(images="unlabelled", score=0.95)})
    split = label_split(read_unlabelled_split(strict, "train"), strict, teacher, device=CPU).split
    assert [len(record.labels) for record in split.records] == [0, 1, 0, 0]


def test_mixed_labels_of_yolo_leave_empty_files_empty(tmp_path: Path) -> None:
    toy.write_images(tmp_path / "images", ["a.png", "b.png", "c.png"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "labels" / "b.txt").touch()
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    data = YoloData(format="yolo", root=tmp_path, labels="mixed")
    teacher: Any = Says()
    found = label_split(read_unlabelled_split(data, "train"), data, teacher, device=CPU)
    assert [len(record.labels) for record in found.split.records] == [1, 0, 1]
    assert (found.by_teacher, found.tables["images"][0]["file_name"]) == (1, "images/a.png")
    (tmp_path / "labels" / "a.txt").unlink()
    (tmp_path / "labels" / "b.txt").unlink()
    found = label_split(read_unlabelled_split(data, "train"), data, teacher, device=CPU)
    assert found.by_teacher == 3


def test_unusable_teacher_labels(folder: Path) -> None:
    teacher: Any = Says()
    split = read_folder(folder)
    strange = FolderData.model_validate({"format": "folder", "labels": {"per_class": {"fish": 0.5}}})
    with pytest.raises(DataError, match="cannot label fish; choose from its classes: cat, dog, bird"):
        label_split(split, strange, teacher, device=CPU)
    strict = FolderData.model_validate({"format": "folder", "root": folder, "labels": {"score": 0.95}})
    with pytest.raises(
        DataError, match=r"detects nothing in .* with a score of 0\.95 or more \(highest score: 0\.90\)"
    ):
        label_split(split, strict, teacher, device=CPU)


def test_a_look_labels_a_few(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdetkd_cli.commands.plan.MOST_LABELLED", 3)
    plan = plan_distill(recipe(folder))
    assert (plan.train_images, plan.val_images) == (10, 2)
    assert any("labelled by the teacher, 3 images of 10, " in note for note in plan.notes)


def test_a_folder_of_images_is_a_data_set(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    run = run_distill(recipe(folder), output=tmp_path / "run", observer=lambda e: told.append(str(e))).run

    assert any("labelled by the teacher, 10 images" in note for note in told)
    tables = json.loads((run / "labels" / "train.json").read_text())
    assert len(tables["images"]) == 10
    assert tables["annotations"]
    assert run_eval(str(run), data=None).metrics.images == 2
    # The labels are an ordinary data set.
    block = {"format": "coco", "root": run / "labels", "train_images": folder, "val_images": folder}
    again = toy.recipe(steps=1).model_copy(update={"data": CocoData.model_validate(block)})
    assert run_train(again, output=tmp_path / "plain").metrics.images == 2


def test_a_resumed_run_does_not_ask_the_teacher_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_distill(recipe(folder), output=tmp_path / "run").run
    first = torch.load(run / "student.pt", weights_only=True)["model"]
    monkeypatch.setattr("gdetkd_cli.assembly.setup.label_split", None)
    resume_run(run)  # from the checkpoint after the first step
    second = torch.load(run / "student.pt", weights_only=True)["model"]
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_annotations_can_be_left_aside(folder: Path, tmp_path: Path) -> None:
    run = run_distill(recipe(folder), output=tmp_path / "first").run
    block = {"format": "coco", "root": run / "labels", "train_images": folder, "val_images": folder}
    block |= {"labels": "teacher"}
    changed = recipe(folder, steps=1).model_copy(update={"data": CocoData.model_validate(block)})
    second = run_distill(changed, output=tmp_path / "second").run
    assert (second / "labels" / "train.json").exists()
    assert not (second / "labels" / "val.json").exists()


def test_plain_training_cannot_label(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="have no annotations; run `gdetkd distill`"):
        run_train(recipe(folder), output=tmp_path / "run")


def test_labels_of_yolo_data_are_coco_files(folder: Path, tmp_path: Path) -> None:
    """For `compare`, whose trials share the labels, the annotated validation images are written, too."""
    (folder / "data.yaml").write_text("train: .\nnames: [disc-dot, square-dot]\n")
    (folder / "03.txt").write_text("0 0.5 0.5 0.5 0.5")
    block = YoloData(format="yolo", root=folder, val=None, labels="teacher")
    whole = require_distillation(recipe(folder).model_copy(update={"data": block, "distill": Distill()}))
    found = label_data(whole, tmp_path / "labels", "cpu", lambda _: None)
    for name in ("data.yaml", "03.txt"):
        (folder / name).unlink()
    assert isinstance(found, CocoData)
    train, val = (build_split(found, which) for which in SPLITS)
    assert (len(train), len(val)) == (10, 2)
    assert train.class_names == val.class_names == ("disc-dot", "square-dot")
    assert sum(len(record.labels) for record in train.records) > 0
    assert [split.read.upright for split in (train, val)] == [True, True]  # type: ignore[attr-defined]


@pytest.mark.parametrize("orientation", [1, 3])  # 3: stored upside down
@pytest.mark.parametrize("kind", ["folder", "yolo", "coco"])
def test_labels_belong_to_the_pixels_that_the_teacher_saw(kind: str, orientation: int, tmp_path: Path) -> None:
    tag, stored = Image.Exif(), Image.new("RGB", (40, 20))
    tag[ExifTags.Base.Orientation] = orientation
    stored.paste((255, 255, 255), (0, 0, 20, 20))  # the left half
    stored.save(tmp_path / "a.png", exif=tag)
    (tmp_path / "data.yaml").write_text("train: .\nval: .\nnames: [cat]\n")
    tables = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "train.json").write_text(json.dumps(tables))
    block = {"format": kind, "root": tmp_path, "labels": "teacher"} | ({"train_images": "."} if kind == "coco" else {})
    data: Any = Recipe.model_validate(recipe(tmp_path).model_dump() | {"data": block}).data
    split = read_folder(tmp_path) if kind == "folder" else read_unlabelled_split(data, "train")
    teacher: Any = Says()
    found = label_split(split, data, teacher, device=CPU)
    write_labels(tmp_path / "labels", {"train": found.tables})
    seen = split.read(0)
    assert seen[:, :, 25:].float().mean() == (255 if orientation == 3 and kind != "coco" else 0)
    for again in (found.split, build_split(data, "train", tmp_path / "labels")):
        assert torch.equal(again.read(0), seen)
