"""Reading COCO files: kept and changed annotations, notes, and refused files."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.readers.coco import align_classes, read_coco
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"

# Two images, 20 x 10 pixels; category ids with a hole, listed out of order.
CLEAN: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "b.png", "width": 20, "height": 10},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [2, 3, 4, 5], "area": 11.5, "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 4, "bbox": [0, 0, 20, 10]},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
}

Change = Callable[[dict[str, Any]], object]


def annotation(box: object, *, image_id: int | None = 3, category_id: int | None = 4, **more: object) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), (255, 128, 0)).save(tmp_path / "images" / name)
    return tmp_path


def read(folder: Path, change: Change | None = None, classes: list[str] | None = None) -> Split:
    content = copy.deepcopy(CLEAN)
    if change is not None:
        change(content)
    (folder / "train.json").write_text(json.dumps(content))
    return read_coco(annotations=folder / "train.json", images=folder / "images", classes=classes)


def add(*annotations: dict[str, Any]) -> Change:
    return lambda content: content["annotations"].extend(annotations)


# ------------------------------------------------------------------------------------------------- reading


def test_clean_file(folder: Path) -> None:
    split = read(folder)

    assert split.name == f"{folder.name}/train.json"
    assert split.class_names == ("cat", "dog")  # by category id: 4, then 9
    assert split.notes == ()
    first, second = split.records
    assert (first.image_id, first.size) == (7, (10, 20))
    assert first.boxes.dtype == torch.float32
    assert first.boxes.tolist() == [[2, 3, 6, 8]]
    assert first.labels.dtype == torch.int64
    assert first.labels.tolist() == [2]
    assert first.truth == [{"bbox": [2, 3, 4, 5], "area": 11.5, "category_id": 2, "iscrowd": 0}]
    assert second.labels.tolist() == [1]
    assert second.truth[0]["area"] == 200  # no area in the file: the box's


def test_images_are_decoded(folder: Path) -> None:
    image = read(folder).read(0)

    assert (image.shape, image.dtype) == ((3, 10, 20), torch.uint8)
    assert image[:, 0, 0].tolist() == [255, 128, 0]


def test_reader_survives_pickling(folder: Path) -> None:
    """Loader processes may be spawned."""
    split = read(folder)

    assert torch.equal(pickle.loads(pickle.dumps(split.read))(1), split.read(1))


def test_classes_choose_and_order(folder: Path) -> None:
    split = read(folder, classes=["dog"])

    assert split.class_names == ("dog",)
    assert [record.labels.tolist() for record in split.records] == [[1], []]
    assert split.notes == (
        "1 image without objects kept as negatives.",
        "1 annotation dropped: the category is not among the chosen classes.",
    )
    assert read(folder, classes=["dog", "cat"]).records[0].labels.tolist() == [1]


def test_image_without_objects(folder: Path) -> None:
    split = read(folder, lambda content: content.update(annotations=[]))

    assert [record.boxes.shape for record in split.records] == [(0, 4), (0, 4)]
    assert [record.labels.shape for record in split.records] == [(0,), (0,)]
    assert [record.labels.dtype for record in split.records] == [torch.int64, torch.int64]
    assert split.notes == ("2 images without objects kept as negatives.",)


def test_crowds_are_for_evaluation_only(folder: Path) -> None:
    split = read(folder, add(annotation([1, 1, 5, 5], iscrowd=1)))

    assert split.records[1].boxes.tolist() == [[0, 0, 20, 10]]
    assert [item["iscrowd"] for item in split.records[1].truth] == [0, 1]
    assert split.notes == ("1 crowd annotation left out of training and kept for evaluation.",)


@pytest.mark.parametrize(("value", "crowds"), [("0", 0), ("1", 1), ("no", 0), (2, 0), (None, 0), ([1], 0)])
def test_an_iscrowd_that_is_no_number_is_never_read_as_true(folder: Path, value: object, crowds: int) -> None:
    split = read(folder, add(annotation([1, 1, 5, 5], iscrowd=value)))

    assert sum(item["iscrowd"] == 1 for item in split.records[1].truth) == crowds
    assert split.notes[-1] == (
        "warning: 1 annotation with an iscrowd other than the number 0 or 1: the text '1' is read as 1, all else as 0."
    )


def test_a_file_that_loses_most_annotations_warns(folder: Path) -> None:
    broken = [annotation([1, 1, 0, 5]), annotation(None), annotation([1, 1, 5, 5], image_id=99)]
    warning = "warning: 3 of 5 annotations are dropped; check the boxes, ids and classes."

    assert warning in read(folder, add(*broken)).notes
    assert not any("warning" in note for note in read(folder, add(*broken[:2])).notes)  # 2 of 4 are not most
    chosen = read(folder, add(*[annotation([1, 1, 5, 5])] * 5), classes=["dog"])
    assert not any("warning" in note for note in chosen.notes)  # left out on purpose


def test_boxes_over_the_edge_are_clipped(folder: Path) -> None:
    split = read(folder, add(annotation([-2, 4, 6, 9]), annotation([15, -1, 5, 2], area=10)))

    assert split.records[1].boxes[1:].tolist() == [[0, 4, 4, 10], [15, 0, 20, 1]]
    assert [item["bbox"] for item in split.records[1].truth[1:]] == [[0, 4, 4, 6], [15, 0, 5, 1]]
    assert [item["area"] for item in split.records[1].truth[1:]] == [24, 10]
    assert split.notes == ("2 annotations with a box over the image's edge clipped.",)


@pytest.mark.parametrize("area", [0, -5, 1e9, "12"])
def test_an_area_that_cannot_be_is_replaced_by_the_boxs(folder: Path, area: Any) -> None:
    assert read(folder, add(annotation([1, 1, 2, 3], area=area))).records[1].truth[1]["area"] == 6


def test_rounding_is_not_clipping(folder: Path) -> None:
    split = read(folder, add(annotation([19.7, 0, 0.300001, 5])))

    assert split.records[1].boxes[1, 2].item() == 20
    assert split.notes == ()


@pytest.mark.parametrize(
    "box",
    [[1, 1, 0, 5], [1, 1, 5, 0], [5, 5, -3, 2], [20, 0, 5, 5], [0, -8, 5, 5], [1e6, 1, 1e-9, 2]],
    ids=["no width", "no height", "negative", "right of the image", "above the image", "side lost in rounding"],
)
def test_boxes_without_area_are_dropped(folder: Path, box: list[float]) -> None:
    split = read(folder, add(annotation(box)))

    assert len(split.records[1].boxes) == len(split.records[1].truth) == 1
    assert split.notes == ("1 annotation dropped: the box has no area inside the image.",)


@pytest.mark.parametrize("box", [None, [], [1, 2, 3], [1, 2, 3, None], [1, 2, float("nan"), 4], [1, 2, 3, "4"], 5])
def test_malformed_boxes_are_dropped(folder: Path, box: object) -> None:
    split = read(folder, add(annotation(box)))

    assert len(split.records[1].boxes) == len(split.records[1].truth) == 1
    assert split.notes == ("1 annotation dropped: the box is not four finite numbers.",)


def test_annotations_of_unknown_ids_are_dropped(folder: Path) -> None:
    box = [1, 1, 2, 2]
    lost = (annotation(box, image_id=8), annotation(box, image_id=None), annotation(box, category_id=5))
    split = read(folder, add(*lost))

    assert sum(len(record.truth) for record in split.records) == 2
    assert split.notes == (
        "2 annotations dropped: image_id is not among the images.",
        "1 annotation dropped: category_id is not among the categories.",
        "warning: 3 of 5 annotations are dropped; check the boxes, ids and classes.",
    )


@pytest.mark.parametrize("key", ["width", "height"])
def test_missing_size_comes_from_the_image(folder: Path, key: str) -> None:
    split = read(folder, lambda content: content["images"][0].pop(key))

    assert split.records[0].size == (10, 20)


# ---------------------------------------------------------------------------------------------- refused files


@pytest.mark.parametrize("missing", ["images", "annotations", "categories"])
def test_json_without_a_table(folder: Path, missing: str) -> None:
    with pytest.raises(DataError, match=rf"no list of objects named {missing};"):
        read(folder, lambda content: content.pop(missing))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation/>", "it is not JSON"),
        (b"\xff\xfe\xfa", "it is not JSON"),
        (b"[1, 2]", "no list of objects named images or annotations or categories"),
        (b'{"images": [1], "annotations": [], "categories": {}}', "no list of objects named images or categories"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
    ],
)
def test_other_files(folder: Path, content: bytes, message: str) -> None:
    file = folder / "train.json"
    file.write_bytes(content)

    with pytest.raises(DataError, match=message):
        read_coco(annotations=file, images=folder / "images")


def test_no_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file .*nowhere\.json"):
        read_coco(annotations=folder / "nowhere.json", images=folder / "images")


def test_no_image_folder(folder: Path) -> None:
    (folder / "images").rename(folder / "elsewhere")

    with pytest.raises(DataError, match=r"no folder .*images"):
        read(folder)


def test_missing_images(folder: Path) -> None:
    (folder / "images" / "b.png").unlink()

    with pytest.raises(DataError, match=r"1 of the 2 images .* are missing, .*b\.png first"):
        read(folder)


def repeat(table: str, **changes: object) -> Change:
    return lambda content: content[table].append({**content[table][0], **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(images=[]), "lists no images"),
        (lambda content: content["images"][0].update(id="7"), "image without a whole-number id"),
        (lambda content: content["images"][0].pop("file_name"), "image without a whole-number id and a file_name"),
        (repeat("images"), "more than one image with the id 7"),
        (repeat("categories", id=5), "more than one category with the name 'dog'"),
        (repeat("categories", name="cow"), "more than one category with the id 9"),
        (lambda content: content["categories"][0].pop("name"), "category without a whole-number id and a name"),
        (lambda content: content.update(categories=[]), "at least one class name .*has: none"),
    ],
)
def test_unusable_tables(folder: Path, change: Change, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(folder, change)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "cow"], "no class cow; its classes are: cat, dog"),
        (["cat", "cat"], "no repeated ones"),
        ([], "at least one class name"),
    ],
)
def test_unusable_classes(folder: Path, classes: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(folder, classes=classes)


# ---------------------------------------------------------------------------------------------------- images


def test_image_of_another_size(folder: Path) -> None:
    Image.new("RGB", (10, 20)).save(folder / "images" / "a.png")
    split = read(folder)

    with pytest.raises(DataError, match=r"a\.png should be 20 x 10 pixels .* but it is 10 x 20"):
        split.read(0)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_broken_image(folder: Path, part: float) -> None:
    image = folder / "images" / "a.png"
    Image.effect_noise((20, 10), 50).save(image)
    content = image.read_bytes()
    image.write_bytes(content[: int(part * len(content))])

    with pytest.raises(DataError, match=r"a\.png cannot be decoded"):
        read(folder).read(0)


def test_broken_image_of_unknown_size(folder: Path) -> None:
    (folder / "images" / "a.png").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        read(folder, lambda content: content["images"][0].pop("width"))


def test_the_annotated_size_decides_about_the_orientation_tag(folder: Path) -> None:
    """COCO's own tools do not turn images, many labelling tools do."""
    tag = Image.Exif()
    tag[0x0112] = 6  # a quarter turn
    for size in ((20, 10), (10, 20)):
        Image.new("RGB", size).save(folder / "images" / "a.png", exif=tag)
        split = read(folder)
        assert split.read(0).shape == (3, 10, 20)
        assert isinstance(split.read, ImageFiles)
        split.read.check_header(0)
    Image.new("RGB", (10, 20)).save(folder / "images" / "a.png")
    with pytest.raises(DataError, match=r"should be 20 x 10 pixels according to its annotations, but it is 10 x 20"):
        read(folder).read(0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "P with alpha", "RGBA", "1"])
def test_other_colour_modes(folder: Path, mode: str) -> None:
    extra = {"transparency": bytes(256)} if mode == "P with alpha" else {}
    Image.new("L", (20, 10), 255).convert(mode.split()[0]).save(folder / "images" / "a.png", **extra)

    with warnings.catch_warnings(action="error"):
        assert read(folder).read(0).tolist() == [[[255] * 20] * 10] * 3


def test_sixteen_bit_grey_keeps_its_range(folder: Path) -> None:
    """Pillow's own conversion would turn all values above 255 white."""
    grey = np.zeros((10, 20), dtype=np.uint16)
    grey[0, :3] = (256, 32768, 65535)
    Image.fromarray(grey).save(folder / "images" / "a.png")
    assert read(folder).read(0)[:, 0, :3].tolist() == [[1, 128, 255]] * 3


def test_floating_point_image(folder: Path) -> None:
    Image.new("F", (20, 10), 0.5).save(folder / "images" / "a.tif")
    with pytest.raises(DataError, match="32 bits"):
        read(folder, lambda content: content["images"][0].update(file_name="a.tif")).read(0)


def test_align_classes_by_name(folder: Path) -> None:
    before = read(folder, lambda content: content["annotations"].pop())
    split = align_classes(before, ("cow", "dog", "cat"))

    assert split.class_names == ("cow", "dog", "cat")
    assert [record.labels.tolist() for record in split.records] == [[2], []]
    assert split.records[1].labels.dtype == torch.int64
    assert split.records[0].truth[0]["category_id"] == 2
    assert align_classes(before, ("cat", "dog")) is before
    align_classes(before, ("dog", "cat"))
    assert (before.records[0].labels.tolist(), before.records[0].truth[0]["category_id"]) == ([2], 2)


def test_align_classes_needs_every_class(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the classes dog, which are not among cat, cow"):
        align_classes(read(folder), ("cat", "cow"))


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs the BCCD data in ../shared/data/bccd")
@pytest.mark.parametrize(("name", "images", "boxes"), [("train", 292, 3941), ("val", 72, 945)])
def test_bccd(name: str, images: int, boxes: int) -> None:
    split = read_coco(annotations=BCCD / f"{name}.json", images=BCCD / "images")

    assert split.name == f"bccd/{name}.json"
    assert split.class_names == ("RBC", "WBC", "Platelets")
    assert len(split) == images
    assert sum(len(record.boxes) for record in split.records) == boxes
    assert split.read(0).shape == (3, *split.records[0].size) == (3, 480, 640)
