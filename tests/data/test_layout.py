"""Common layouts of data folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdetkd_cli.data.readers.layout import Layout, find_layout, find_voc_lists
from gdetkd_cli.data.readers.yolo_layout import YoloLayout, find_yolo
from gdetkd_cli.data.sources import find_sources
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import walk_files


def write_coco(path: Path, image: str = "a.jpg", **annotation: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    annotations = [annotation or {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]
    tables = {"images": [{"id": 1, "file_name": image}], "annotations": annotations, "categories": []}
    path.write_text(json.dumps(tables))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def build_layout(train: str, val: str, train_images: str, val_images: str) -> Layout:
    return Layout(Path(train), Path(val), Path(train_images), Path(val_images))


def test_plain(tmp_path: Path) -> None:
    write_coco(tmp_path / "train.json")
    write_coco(tmp_path / "val.json")
    write_image(tmp_path / "images" / "a.jpg")
    assert find_layout(tmp_path) == build_layout("train.json", "val.json", "images", "images")


def test_coco(tmp_path: Path) -> None:
    for year in ("train2017", "val2017"):
        write_coco(tmp_path / "annotations" / f"instances_{year}.json", image=f"{year}.jpg")
        write_coco(tmp_path / "annotations" / f"captions_{year}.json", image=f"{year}.jpg", caption="a dog")
        write_image(tmp_path / year / f"{year}.jpg")
    found = find_layout(tmp_path)
    assert (found.train, found.val) == (
        Path("annotations/instances_train2017.json"),
        Path("annotations/instances_val2017.json"),
    )
    assert (found.train_images, found.val_images) == (Path("train2017"), Path("val2017"))


def test_roboflow(tmp_path: Path) -> None:
    for split in ("test", "train", "valid"):
        write_coco(tmp_path / split / "_annotations.coco.json")
        write_image(tmp_path / split / "a.jpg")
    found = find_layout(tmp_path)
    assert found == build_layout("train/_annotations.coco.json", "valid/_annotations.coco.json", "train", "valid")


@pytest.mark.parametrize(
    ("file", "image", "folder"),
    [
        ("annotations/instances_default.json", "images/default/a.jpg", "images/default"),  # CVAT
        ("result.json", "images/a.jpg", "images"),  # Label Studio
        ("train.json", "a.jpg", "."),
    ],
)
def test_a_single_file_has_no_validation_split(tmp_path: Path, file: str, image: str, folder: str) -> None:
    write_coco(tmp_path / file)
    write_image(tmp_path / image)
    assert find_layout(tmp_path) == Layout(Path(file), None, Path(folder), None)


def test_a_single_file_of_validation_is_not_for_training(tmp_path: Path) -> None:
    write_coco(tmp_path / "val.json")
    write_image(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="no annotations of a training split"):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (["voc07_trainval.json", "voc07_test.json"], "voc07_trainval.json", "voc07_test.json"),
        (["a_train.json", "a_trainval.json", "a_val.json"], "a_train.json", "a_val.json"),
        (["trainval/instances_train2017.json", "trainval/instances_val2017.json"], "train2017", "val2017"),
        (["latest/train.json", "latest/valid.json"], "train.json", "valid.json"),
        (["myTrain.json", "myVal.json"], "myTrain.json", "myVal.json"),
        (["train/valves.json", "val/valves.json"], "train/valves.json", "val/valves.json"),
    ],
)
def test_names_of_splits(tmp_path: Path, files: list[str], train: str, val: str) -> None:
    for file in files:
        write_coco(tmp_path / file)
    write_image(tmp_path / "images" / "a.jpg")
    found = find_layout(tmp_path)
    assert train in str(found.train) and found.val is not None and val in str(found.val)


def test_splits_with_equal_file_names_have_their_own_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path / "annotations" / f"instances_{split}.json", image="000.png")
        write_image(tmp_path / "images" / split / "000.png")
    found = find_layout(tmp_path)
    assert (found.train_images, found.val_images) == (Path("images/train"), Path("images/val"))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_image(tmp_path / "disk" / "b.png")
    write_image(tmp_path / "set" / "a.png")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "disk")
    for name, place in (("more", "disk"), ("again", "disk"), ("self", "set"), ("above", ".")):
        (tmp_path / "set" / name).symlink_to(tmp_path / place)
    found = [path.relative_to(tmp_path / "set").as_posix() for path in walk_files(tmp_path / "set")]
    assert sorted(found) == ["a.png", "again/b.png"]
    assert [source.name for source in find_sources([str(tmp_path / "set")])] == ["a.png", "again/b.png"]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        find_layout(tmp_path / "absent")
    (tmp_path / "notes.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"no annotations of a training split in .*found: no COCO detection file"):
        find_layout(tmp_path)
    write_coco(tmp_path / "train.json")
    write_coco(tmp_path / "other.json")
    with pytest.raises(DataError, match=r"no annotations of a validation split in .*found: other\.json, train\.json"):
        find_layout(tmp_path)
    write_coco(tmp_path / "val.json")
    with pytest.raises(DataError, match=r"train\.json names the image a\.jpg, which is nowhere in"):
        find_layout(tmp_path)


def find_lists(root: Path, **years: list[str]) -> tuple[list[str], list[str] | None] | None:
    for year, names in years.items():
        (root / year / "ImageSets" / "Main").mkdir(parents=True)
        for name in names:
            (root / year / "ImageSets" / "Main" / f"{name}.txt").touch()
    found = find_voc_lists(root)
    if found is None:
        return None
    train, val = found
    names = [f"{path.parts[0]}/{path.stem}" for path in train]
    return names, None if val is None else [f"{path.parts[0]}/{path.stem}" for path in val]


def test_voc_validates_on_the_test_list(tmp_path: Path) -> None:
    both = ["train", "val", "trainval"]
    assert find_lists(tmp_path, VOC2007=[*both, "test", "cat_train"], VOC2012=both) == (
        ["VOC2007/trainval", "VOC2012/trainval"],
        ["VOC2007/test"],
    )


def test_voc_without_test_list(tmp_path: Path) -> None:
    assert find_lists(tmp_path, VOC2012=["train", "val", "trainval"]) == (["VOC2012/train"], ["VOC2012/val"])
    assert find_lists(tmp_path / "other", mine=["trainval"]) == (["mine/trainval"], None)
    assert find_lists(tmp_path / "cvat", mine=["default"]) == (["mine/default"], None)
    assert find_lists(tmp_path / "none", mine=["cat_train"]) is None


def write_files(root: Path, *files: str, **texts: str) -> None:
    for name in files:
        write_image(root / name)
    for name, text in texts.items():
        (root / name.replace("_", ".")).write_text(text)


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


def test_ultralytics_and_roboflow_name_their_folders(tmp_path: Path) -> None:
    write_files(tmp_path / "u", "images/train/a.jpg", "images/val/b.jpg")
    write_files(tmp_path / "u", data_yaml="train: images/train\nval: images/val\nnames: {0: cat}")
    assert find_yolo(tmp_path / "u") == YoloLayout(Path("data.yaml"), "auto", "auto")
    write_files(tmp_path / "r", "train/images/a.jpg", "valid/images/b.jpg")
    write_files(tmp_path / "r", data_yaml="train: ../train/images\nval: ../valid/images\nnames: [cat]")
    assert find_yolo(tmp_path / "r") == YoloLayout(Path("data.yaml"), "auto", "auto")


def test_folders_that_data_yaml_names_wrongly_are_found(tmp_path: Path) -> None:
    write_files(tmp_path, "images/train2017/a.jpg", "images/val2017/b.jpg")
    write_files(tmp_path, data_yaml="train: /kaggle/input/x/train\nval: gone\nnames: [cat]")
    found = find_yolo(tmp_path)
    assert found == YoloLayout(Path("data.yaml"), paths("images/train2017"), paths("images/val2017"))


def test_cvat_has_lists_and_perhaps_no_validation(tmp_path: Path) -> None:
    write_files(tmp_path, "obj_train_data/a.jpg", "obj_train_data/a.txt")
    write_files(tmp_path, obj_names="cat\n", train_txt="data/obj_train_data/a.jpg\n", obj_data="classes = 1\n")
    assert find_yolo(tmp_path) == YoloLayout(Path("obj.names"), paths("train.txt"), None)
    write_files(tmp_path, valid_txt="data/obj_train_data/a.jpg\n")
    assert find_yolo(tmp_path) == YoloLayout(Path("obj.names"), paths("train.txt"), paths("valid.txt"))


def test_label_studio_has_one_set_of_images(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "labels/a.txt", classes_txt="cat\n", notes_json="{}")
    assert find_yolo(tmp_path) == YoloLayout(Path("classes.txt"), paths("images"), None)


def test_labels_beside_images(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "a.txt", classes_txt="cat\n")
    assert find_yolo(tmp_path) == YoloLayout(Path("classes.txt"), paths("."), None)


def test_other_folders_are_not_taken_for_yolo(tmp_path: Path) -> None:
    assert find_yolo(tmp_path / "absent") is None
    write_files(tmp_path, "images/a.jpg", classes_txt="cat\n", recipe_yaml="name: x\ndata: {format: coco}\n")
    assert find_yolo(tmp_path) is None
    write_files(tmp_path, data_yaml="names: [cat")
    with pytest.raises(DataError, match="not valid YAML"):
        find_yolo(tmp_path)
