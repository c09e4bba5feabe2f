"""Reading YOLO's data.yaml, lists, folders and label files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdetkd_cli import assembly
from gdetkd_cli.data.split import DataProblem, Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.recipe.schema import YoloData

YAML = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def write_image(path: Path, labels: str | None = None) -> None:
    """Writes an image of 20 x 10 pixels and its labels, beside it or in ``labels``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(path)
    if labels is not None:
        parts = ["labels" if part == "images" else part for part in path.parts]
        file = Path(*parts).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    write_image(root / "images/train/a.jpg", "1 0.5 0.5 0.2 0.4\n0 0.25 0.5 0.5 1.0\n")
    write_image(root / "images/train/more/b.png", "")
    write_image(root / "images/train/c.jpg")
    write_image(root / "images/val/d.jpg", "0 0.5 0.5 1 1")
    (root / "data.yaml").write_text(YAML)
    return root


def read(root: Path, which: assembly.Which = "train", **fields: Any) -> Split:
    return assembly.build_split(YoloData(format="yolo", root=root, **fields), which)


def read_rows(root: Path, rows: str, **options: Any) -> Split:
    (root / "labels/train/a.txt").write_text(rows)
    return assembly.build_split(YoloData(format="yolo", root=root), "train", **options)


# ------------------------------------------------------------------------------------------------------------ reading


def test_boxes_and_images_without_objects(folder: Path) -> None:
    split = read(folder)
    assert split.class_names == ("cat", "dog")
    assert split.name == "images/train"
    a, c, b = split.records  # in the order of the paths
    assert (a.size, a.image_id) == ((10, 20), 1)
    assert a.boxes.tolist() == [[8, 3, 12, 7], [0, 0, 10, 10]]
    assert a.labels.tolist() == [2, 1]
    assert a.truth[0]["area"] == pytest.approx(16)
    assert [len(record.boxes) for record in (c, b)] == [0, 0]
    assert split.read(0).shape == (3, 10, 20)
    assert split.notes == (
        "1 image without a label file, read as images without objects.",
        "2 images without objects kept as negatives.",
    )
    assert read(folder, "val").records[0].boxes.tolist() == [[0, 0, 20, 10]]


@pytest.mark.parametrize(
    "names",
    ["names: {0: cat, 1: dog}", "nc: 2\nnames: ['cat', 'dog']", "names:\n  1: dog\n  0: cat", "names: [cat, dog]"],
)
def test_forms_of_names(folder: Path, names: str) -> None:
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\n{names}\n")
    assert read(folder).class_names == ("cat", "dog")


def test_names_are_read_as_written(folder: Path) -> None:
    (folder / "data.yaml").write_text("train: images/train\nnames: [no, 1.10]\n")
    assert read(folder).class_names == ("no", "1.10")


def test_class_numbers_may_have_holes(folder: Path) -> None:
    (folder / "data.yaml").write_text("train: images/train\nnames: {1: dog, 7: bird}\n")
    split = read_rows(folder, "1 0.5 0.5 0.2 0.4\n7 0.5 0.5 0.2 0.4\n0 0.5 0.5 0.2 0.4\n")
    assert split.records[0].labels.tolist() == [1, 2]
    assert f"1 row dropped: the class number has no name ({folder}/labels/train/a.txt:3)." in split.notes


@pytest.mark.parametrize(
    "entries",
    [
        "path: mine\ntrain: images/train",  # the folder's own name, as seen from a folder of data sets
        "path: /content/datasets/mine\ntrain: images/train",  # of another machine
        "train: ../images/train",  # as Roboflow writes it
        "train: [images/train, images/train/more]",  # an image counts once
    ],
)
def test_paths_of_other_machines(folder: Path, entries: str) -> None:
    (folder / "data.yaml").write_text(f"{entries}\nnames: [cat, dog]\n")
    assert len(read(folder)) == 3


@pytest.mark.parametrize(
    "lines",
    ["images/train/a.jpg\nimages/val/d.jpg", "./images/train/a.jpg\n\n./images/val/d.jpg\n",
     "data/images/train/a.jpg\r\ndata/images/val/d.jpg"],
)  # fmt: skip
def test_lists_of_images(folder: Path, lines: str) -> None:
    (folder / "train.txt").write_text(lines)
    split = read(folder, train=["train.txt"])
    assert [len(record.boxes) for record in split.records] == [2, 1]
    assert split.name == "mine/train.txt"


def test_labels_beside_images_and_names_in_a_text_file(tmp_path: Path) -> None:
    write_image(tmp_path / "obj_train_data/a.jpg", "1 0.5 0.5 0.2 0.4")
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/a.jpg\n")
    split = read(tmp_path, names="obj.names", train=["train.txt"])
    assert split.class_names == ("cat", "dog")
    assert split.records[0].labels.tolist() == [2]


def test_only_the_last_folder_of_images_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "images" / "mine"
    write_image(root / "images" / "a.jpg")
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 0.5 0.5 1 1")
    (root / "data.yaml").write_text("train: images\nnames: [cat]\n")
    assert len(read(root).records[0].boxes) == 1


def test_labels_belong_to_the_upright_image(folder: Path) -> None:
    """As in the tools that write YOLO's labels; a phone stores a photograph as its sensor sees it."""
    tag = Image.Exif()
    tag[0x0112] = 6  # a quarter turn to the right
    stored = Image.new("RGB", (40, 20))
    stored.paste((255, 255, 255), (0, 0, 20, 20))  # its left half, which is at the top of the upright image
    stored.save(folder / "images" / "train" / "a.jpg", exif=tag, quality=95)
    split = read_rows(folder, "0 0.5 0.25 1 0.5")
    record = split.records[0]
    assert (record.size, record.boxes.tolist()) == ((40, 20), [[0, 0, 20, 20]])
    pixels = split.read(0)
    assert pixels.shape == (3, 40, 20) and pixels[:, :19].min() > 200 and pixels[:, 21:].max() < 55


def test_polygons_become_their_enclosing_boxes(folder: Path) -> None:
    split = read_rows(folder, "0 0.1 0.2 0.5 0.2 0.5 0.8\n1 0.5 0.5 0.2 0.4", outlines=True)
    record = split.records[0]
    assert record.boxes[0].tolist() == pytest.approx([2, 2, 10, 8])
    polygon = record.outlines[0]
    assert isinstance(polygon, list)
    assert polygon[0].tolist() == pytest.approx([2, 2, 10, 2, 10, 8])
    assert record.outlines[1] is None
    assert read_rows(folder, "0 0.1 0.2 0.5 0.2 0.5 0.8").records[0].outlines == ()


def test_key_points_are_passed_over(folder: Path) -> None:
    (folder / "data.yaml").write_text(YAML + "kpt_shape: [1, 2]\n")
    split = read_rows(folder, "0 0.5 0.5 0.2 0.4 0.1 0.9\n")
    assert split.records[0].boxes.tolist() == [[8, 3, 12, 7]]


def test_every_tenth_image_is_held_out(tmp_path: Path) -> None:
    for number in range(12):
        write_image(tmp_path / "images" / f"{number:02}.jpg", "0 0.5 0.5 0.2 0.4")
    (tmp_path / "classes.txt").write_text("cat\n")
    fields: dict[str, Any] = {"names": "classes.txt", "train": ["images"], "val": None}
    train, val = read(tmp_path, **fields), read(tmp_path, "val", **fields)
    assert [record.image_id for record in val.records] == [1, 11]
    assert len(train) == 10
    assert train.read(0).shape == (3, 10, 20)
    whole = read(tmp_path, **fields, fold={"number": 1, "of": 4})
    assert len(whole) == 9


# ------------------------------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ("0 0.5 0.5 0.2", "not a class number with 4 numbers"),
        ("0 0.5 0.5 0.2 0.4 0.9", "not a class number with 4 numbers"),  # a detection with its score
        ("cat 0.5 0.5 0.2 0.4", "not a class number with 4 numbers"),
        ("0.5 0.5 0.5 0.2 0.4", "not a class number with 4 numbers"),
        ("0 nan 0.5 0.2 0.4", "not a class number with 4 numbers"),
        ("0 0.5 0.5 0.2 1e999", "not a class number with 4 numbers"),
        ("9" * 5000 + " 0.5 0.5 0.2 0.4", "not a class number with 4 numbers"),
        ("0 0_1 0.5 0.2 0.4", "not a class number with 4 numbers"),
        ("0 10 5 4 4", "not between 0 and 1"),
        ("0 0.5 0.5 -0.2 0.4", "not between 0 and 1"),
        ("2 0.5 0.5 0.2 0.4", "the class number has no name"),
        ("-1 0.5 0.5 0.2 0.4", "the class number has no name"),
    ],
)
def test_a_bad_row_is_counted_with_its_line(folder: Path, row: str, note: str) -> None:
    problems: list[DataProblem] = []
    split = read_rows(folder, f"0 0.5 0.5 0.2 0.4\n\n{row}\n0 0.5 0.5 0.2 0.4", problems=problems)
    assert len(split.records[0].boxes) == 2
    place = f"{folder}/labels/train/a.txt:3"
    assert any(note in each and place in each for each in split.notes)
    assert [problem.place for problem in problems] == [place]
    assert note in problems[0].problem


def test_boxes_over_the_edge_and_without_area(folder: Path) -> None:
    problems: list[DataProblem] = []
    split = read_rows(folder, "0 0.95 0.5 0.2 0.4\n0 0.5 0.5 0 0.4\n0 0.5 0.5 0.2 0.4", problems=problems)
    assert [round(side, 4) for side in split.records[0].boxes[0].tolist()] == [17, 3, 20, 7]
    assert [problem.problem.partition(":")[0] for problem in problems] == [
        "annotation with a box over the image's edge clipped",
        "annotation dropped",
    ]
    assert [problem.place.rpartition(":")[2] for problem in problems] == ["1", "2"]


def test_most_rows_dropped_is_a_warning(folder: Path) -> None:
    split = read_rows(folder, "5 0.5 0.5 0.2 0.4\n5 0.5 0.5 0.2 0.4\n0 0.5 0.5 0.2 0.4")
    assert split.notes[-1] == "warning: 2 of 3 annotations are dropped; check the boxes, ids and classes."


def test_labels_that_are_not_text(folder: Path) -> None:
    (folder / "labels/train/a.txt").write_bytes(b"\xff\xfe0\x00 \x00\n0 0.5 0.5 0.2 0.4\n")
    split = read(folder)
    assert len(split.records[0].boxes) == 1
    assert any("1 row dropped" in note for note in split.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [cat", "not valid YAML"),
        ("[1, 2]", "should be YOLO's data.yaml with `names`"),
        ("train: images/train", "should be YOLO's data.yaml with `names`"),
        ("names: cat", "`names` should be a list of class names"),
        ("names: {a: cat}", "`names` should be a list of class names"),
        ("names: {0: cat, 00: dog}", "`names` should be a list of class names"),
        ("names: []", "`names` should be a list of class names"),
        ("names: [cat, cat]\ntrain: images/train", "more than one category with the name 'cat'"),
        ("nc: 3\nnames: [cat]", "has 1 names, but nc: 3"),
        ("names: [cat]", "names no train images; add `train:` to it, or set data.train$"),
        ("names: [cat]\ntrain: 3", "`train` should be a folder of images"),
        ("names: [cat]\ntrain: images/none", "there is no .*images/none; correct"),
        ("names: [cat]\ntrain: /", "a folder above its own"),
        ("names: [cat]\ntrain: data.yaml", "expected a folder of images or a .txt file"),
        ("names: [cat]\ntrain: labels", "there are no images in"),
        ("names: [" + "cat, " * 200_000 + "]", "too large"),
    ],
)
def test_faults_of_data_yaml(folder: Path, content: str, message: str) -> None:
    (folder / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        read(folder)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*names\.txt; give YOLO's data\.yaml"):
        read(folder, names="names.txt")
    (folder / "list.txt").write_text("a.jpg\nimages/train/a.jpg\n")
    with pytest.raises(DataError, match=r"1 of the 2 images that .*list\.txt names are missing, a\.jpg first"):
        read(folder, train=["list.txt"])
    (folder / "list.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="list of images in UTF-8"):
        read(folder, train=["list.txt"])
    (folder / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="names no images"):
        read(folder, train=["list.txt"])
    (folder / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    with pytest.raises(DataError, match=r"names no val images; add `val:` to it, or set data.val, or `data.val: null`"):
        read(folder, "val")
    with pytest.raises(DataError, match=r"has no class bird; its classes are: cat, dog"):
        read(folder, classes=["bird"])


def test_labels_in_the_wrong_place(folder: Path) -> None:
    (folder / "labels").rename(folder / "annotations")
    with pytest.raises(DataError, match=r"none of the 3 images .*expected for the first one .*labels/train/a\.txt"):
        read(folder)


def test_an_unreadable_image_is_left_out_on_request(folder: Path) -> None:
    (folder / "images/train/c.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c\.jpg cannot be read"):
        read(folder)
    split = read(folder, on_bad_sample="skip")
    assert [record.image_id for record in split.records] == [1, 3]


def test_chosen_classes(folder: Path) -> None:
    split = read(folder, classes=["dog"])
    assert split.class_names == ("dog",)
    assert split.records[0].labels.tolist() == [1]
    assert "1 annotation dropped: the category is not among the chosen classes." in split.notes
