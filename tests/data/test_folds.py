"""Folds: every image is held out once, is never in its own training set, and is read unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gdetkd_cli import assembly
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError, RecipeError
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import Bdd100kData, CocoData, Data, Fold, SyntheticData, VocData

NAMES = ("cat", "dog")
OUTLINE = [10, 10, 30, 10, 30, 30]


def write_coco(
    root: Path, *, val: tuple[int, ...] = (1, 2, 3), names: tuple[str, ...] = NAMES, **options: Any
) -> CocoData:
    """Writes 7 training and 3 validation images with overlapping ids; image n has the grey value n * 20."""
    (root / "images").mkdir(exist_ok=True)
    for split, ids, first in (("train", range(1, 8), 0), ("val", val, 7)):
        images, annotations = [], []
        for number, image_id in enumerate(ids, start=1):
            name = f"{first + number}.png"
            Image.new("RGB", (64, 48), ((first + number) * 20,) * 3).save(root / "images" / name)
            images.append({"id": image_id, "file_name": name, "height": 48, "width": 64})
            box = {"bbox": [10, 10, 20, 20], "category_id": 1 + number % len(names), "segmentation": [OUTLINE]}
            annotations.append({"id": number, "image_id": image_id, "iscrowd": 0, "area": 400, **box})
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        tables = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(tables))
    return CocoData(format="coco", root=root, **options)


def build_fold(data: Data, number: int, of: int, which: assembly.Which, **options: Any) -> Split:
    return assembly.build_split(data.model_copy(update={"fold": Fold(number=number, of=of)}), which, **options)


def read_shades(split: Split) -> dict[int, int]:
    """Returns the grey value of each image by id."""
    return {record.image_id: int(split.read(i)[0, 0, 0]) for i, record in enumerate(split.records)}


@pytest.mark.parametrize("of", [2, 3, 10])
def test_every_image_is_held_out_once_and_never_in_its_training_set(tmp_path: Path, of: int) -> None:
    data = write_coco(tmp_path)
    every = {number: number * 20 for number in range(1, 11)}
    held_out: dict[int, int] = {}
    for number in range(1, of + 1):
        train, val = (read_shades(build_fold(data, number, of, which)) for which in assembly.SPLITS)
        assert not train.keys() & val.keys()
        assert train | val == every  # each id is the same image in both
        assert not held_out.keys() & val.keys()
        assert 10 // of <= len(val) <= -(-10 // of)
        held_out |= val
    assert held_out == every
    assert read_shades(assembly.build_all_folds(data.model_copy(update={"fold": Fold(number=1, of=of)}))) == every


def test_fold_is_reproducible_and_mixes_both_splits(tmp_path: Path) -> None:
    data = write_coco(tmp_path)
    first = list(read_shades(build_fold(data, 1, 2, "val")))
    assert first == list(read_shades(build_fold(data, 1, 2, "val"))) == sorted(first)
    assert any(image_id > 7 for image_id in first) and any(image_id <= 7 for image_id in first)
    # NumPy's RandomState never changes, so finished trials of an older installation stay comparable.
    assert first == [1, 2, 3, 5, 8]


def test_records_keep_truth_outlines_and_notes(tmp_path: Path) -> None:
    data = write_coco(tmp_path)
    tables = json.loads((tmp_path / "val.json").read_text())
    tables["annotations"][0]["image_id"] = 99
    (tmp_path / "val.json").write_text(json.dumps(tables))
    train = build_fold(data, 1, 2, "train", outlines=True)
    assert all(len(record.outlines) == len(record.labels) for record in train.records)
    assert train.records[0].outlines
    assert f"{tmp_path.name}/val.json: 1 annotation dropped: image_id is not among the images." in train.notes
    assert train.name == f"{tmp_path.name}/train.json and {tmp_path.name}/val.json, all but fold 1 of 2"
    assert build_fold(data, 1, 2, "val").name.endswith("held out fold 1 of 2")


def test_labels_refer_to_one_class_list(tmp_path: Path) -> None:
    data = write_coco(tmp_path)
    tables = json.loads((tmp_path / "val.json").read_text())
    tables["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    (tmp_path / "val.json").write_text(json.dumps(tables))
    whole = assembly.build_all_folds(data.model_copy(update={"fold": Fold(number=1, of=2)}))
    assert whole.class_names == NAMES
    # The first image of each file has the file's second category: dog for training, cat for validation.
    assert [int(whole.records[i].labels[0]) for i in (0, 7)] == [2, 1]
    assert [whole.records[i].truth[0]["category_id"] for i in (0, 7)] == [2, 1]


def check_partition(data: Data, images: int) -> None:
    held_out: list[int] = []
    for number in (1, 2):
        train, val = (read_shades(build_fold(data, number, 2, which)) for which in assembly.SPLITS)
        assert sorted([*train, *val]) == list(range(1, images + 1))
        assert len({*train.values(), *val.values()}) == images
        held_out += val
    assert sorted(held_out) == list(range(1, images + 1))


def test_folds_of_voc(tmp_path: Path) -> None:
    """Two lists of Pascal VOC with different images."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("val", range(3, 5))):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{n}\n" for n in numbers))
        for n in numbers:
            Image.new("RGB", (32, 32), (n * 20,) * 3).save(tmp_path / "JPEGImages" / f"{n}.png")
            box = "<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            xml = f"<annotation><object><name>cat</name>{box}</object></annotation>"
            (tmp_path / "Annotations" / f"{n}.xml").write_text(xml)
    lists = {split: [Path("ImageSets/Main") / f"{split}.txt"] for split in ("train", "val")}
    check_partition(VocData(format="voc", root=tmp_path, classes=["cat"], **lists), 5)


def test_folds_of_bdd100k(tmp_path: Path) -> None:
    """Two files of BDD100K with overlapping frame numbers."""
    (tmp_path / "images").mkdir()
    for split, numbers in (("train", range(3)), ("val", range(3, 5))):
        for n in numbers:
            Image.new("RGB", (32, 32), (n * 20,) * 3).save(tmp_path / "images" / f"{n}.png")
        label = {"category": "car", "box2d": {"x1": 2, "y1": 2, "x2": 9, "y2": 9}}
        (tmp_path / f"{split}.json").write_text(json.dumps([{"name": f"{n}.png", "labels": [label]} for n in numbers]))
    paths = {split: Path(f"{split}.json") for split in ("train", "val")}
    folders = {f"{split}_images": Path("images") for split in ("train", "val")}
    check_partition(Bdd100kData(format="bdd100k", root=tmp_path, **paths, **folders), 5)


def test_folds_of_scenes() -> None:
    data = SyntheticData(train_images=5, val_images=2, size=64)
    parts = [assembly.build_split(data, which) for which in assembly.SPLITS]
    scenes = [part.read(i) for part in parts for i in range(len(part))]
    ids: list[int] = []
    for number in (1, 2, 3):
        val = build_fold(data, number, 3, "val")
        for i, record in enumerate(val.records):
            assert torch.equal(val.read(i), scenes[record.image_id - 1])
        ids += [record.image_id for record in val.records]
    assert sorted(ids) == list(range(1, 8))


def test_more_folds_than_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 images cannot be divided into 11 folds; choose 10 folds or fewer"):
        build_fold(write_coco(tmp_path), 1, 11, "val")


def test_an_image_in_both_splits(tmp_path: Path) -> None:
    data = write_coco(tmp_path).model_copy(update={"val": Path("train.json")})
    with pytest.raises(DataError, match=r"name 7 images more than once, .*1\.png first; folds need each image once"):
        build_fold(data, 1, 2, "val")


RECIPE = """name: toy
data: {{format: coco, {data}}}
student: {{arch: torchvision, name: fcos_resnet50_fpn}}
train: {{steps: 1}}
"""


def test_recipe_with_fold(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(data="fold: {number: 2, of: 5}"))
    recipe = load_recipe(path)
    assert isinstance(recipe.data, CocoData) and recipe.data.fold == Fold(number=2, of=5)
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("fold: {number: 6, of: 5}", "number must be 1 to 5, the number of folds; got 6"),
        ("fold: {number: 0, of: 5}", "greater than 0|greater than or equal to 1|more than 0"),
        ("fold: {number: 1, of: 1}", "2"),
        ("fold: {number: 1, of: 2}, labels: teacher", "fold requires annotations for every image"),
    ],
)
def test_invalid_folds(tmp_path: Path, data: str, message: str) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(data=data))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
