"""What a data set contains: counts, problems and a sheet of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdetkd_cli.commands import run_data
from gdetkd_cli.errors import DataError, GDetKDError
from gdetkd_cli.recipe.schema import CocoData, Fold, SyntheticData, YoloData


@pytest.fixture
def yolo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two training images and one for validation, 200 x 100 pixels, with a box of each size."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "mine"
    for colour, (name, rows) in enumerate(
        (
            ("train/a", "0 0.5 0.5 0.1 0.2\n1 0.5 0.5 0.3 0.6\n1 0.5 0.5 0.9 1.0\n"),
            ("train/b", ""),
            ("val/c", "0 0.5 0.5 0.1 0.2\n7 0.5 0.5 0.1 0.2\n0 0.95 0.5 0.2 0.2"),
        )
    ):
        for part, ending in (("images", ".png"), ("labels", ".txt")):
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            if part == "images":
                Image.new("RGB", (200, 100), (100 * colour, 0, 0)).save(root / part / (name + ending))
            else:
                (root / part / (name + ending)).write_text(rows)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return root


def test_counts_and_problems(yolo: Path) -> None:
    report = run_data("mine", data=yolo)
    assert (report.source, report.format, report.data) == ("mine", "yolo", {"format": "yolo", "root": str(yolo)})
    train, val = report.splits
    assert (train.split, train.images, train.without_objects, train.boxes, train.crowds) == ("train", 2, 1, 3, 0)
    assert (train.small, train.medium, train.large) == (1, 1, 1)
    assert train.per_class == {"cat": 1, "dog": 2}
    assert (val.images, val.boxes, val.per_class) == (1, 2, {"cat": 2, "dog": 0})
    assert [(Path(one.place).name, one.problem.partition(":")[0]) for one in report.problems] == [
        ("c.txt:2", "row dropped"),
        ("c.txt:3", "annotation with a box over the image's edge clipped"),
    ]
    assert report.sheet == Path("data.png")
    with Image.open("data.png") as sheet:
        assert sheet.format == "PNG"


def test_images_with_problems_are_listed(yolo: Path) -> None:
    (yolo / "images/train/b.png").write_bytes(b"no image")
    (yolo / "images/val/c.png").write_bytes((yolo / "images/train/a.png").read_bytes())
    report = run_data("mine", data=yolo)
    problems = {Path(one.place).name: one.problem for one in report.problems}
    assert problems["b.png"].startswith("cannot be read")
    assert problems["c.png"] == "is a training image and a validation image"
    assert [split.images for split in report.splits] == [1, 1]


def write_coco(root: Path, **image: Any) -> None:
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(root / "images" / "a.png")
    boxes: list[object] = [[0, 0, 5, 5], [15, 0, 10, 5], None]
    tables = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10, **image}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for box in boxes],
        "categories": [{"id": 1, "name": "cell"}],
    }
    for which in ("train", "val"):
        (root / f"{which}.json").write_text(json.dumps(tables))


def test_images_with_problems_are_listed_with_a_fold(yolo: Path) -> None:
    (yolo / "images/train/b.png").write_bytes(b"no image")
    pixels = (yolo / "images/train/a.png").read_bytes()
    (yolo / "images/val/c.png").write_bytes(pixels[: len(pixels) // 2])
    for name in "de":
        (yolo / f"images/val/{name}.png").write_bytes(pixels)
    data = YoloData(format="yolo", root=yolo, fold=Fold(number=1, of=2))
    report = run_data("mine", data=data)
    assert "b.png" in {Path(one.place).name for one in report.problems}
    assert sum(split.images for split in report.splits) == 4


def test_problems_of_coco_files_name_annotation_and_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "coco", width=21)
    report = run_data("coco", data=CocoData(format="coco", root=Path("coco")), sheet=tmp_path / "new" / "sheet.png")
    assert report.splits[0].boxes == 2
    own = [one for one in report.problems if "train.json" in one.place]
    assert [one.place for one in own] == [f"coco/train.json, annotation {number} (image a.png)" for number in (2, 3)]
    assert any("should be 21 x 10 pixels" in one.problem for one in report.problems)
    assert report.sheet is None  # its only image has another size than its annotations state
    assert not (tmp_path / "new" / "sheet.png").exists()


def test_no_sheet_is_overwritten(yolo: Path) -> None:
    Path("data.png").write_bytes(b"mine")
    assert run_data("mine", data=yolo).sheet == Path("data-2.png")
    assert run_data("mine", data=yolo).sheet == Path("data-3.png")
    assert Path("data.png").read_bytes() == b"mine"
    with pytest.raises(GDetKDError, match=r"data\.png already exists; choose another file with --sheet"):
        run_data("mine", data=yolo, sheet=Path("data.png"))
    with pytest.raises(GDetKDError, match="cannot draw a file with this suffix"):
        run_data("mine", data=yolo, sheet=Path("data.xyz"))


def test_images_without_annotations_and_built_in_scenes(yolo: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "alone").mkdir(exist_ok=True)
        Image.new("RGB", (20, 10)).save(tmp_path / "alone" / f"{number}.png")
    report = run_data("alone", data=tmp_path / "alone")
    assert (report.format, [split.annotated for split in report.splits]) == ("folder", [False, False])
    assert [split.boxes for split in report.splits] == [0, 0]
    scenes = run_data("scenes", data=SyntheticData(train_images=3, val_images=2))
    assert scenes.splits[0].boxes > 0
    with pytest.raises(DataError, match="there is no folder"):
        run_data("none", data=tmp_path / "none")
