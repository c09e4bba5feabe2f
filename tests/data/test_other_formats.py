"""Reading files of Pascal VOC and BDD100K."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdetkd_cli import assembly
from gdetkd_cli.data.readers.bdd100k import BDD_CLASSES, read_bdd100k
from gdetkd_cli.data.readers.voc import VOC_CLASSES, read_voc
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.recipe.schema import Bdd100kData, VocData

OBJECT = "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
SIZE = "<size><width>20</width><height>10</height><depth>3</depth></size>"


def corners(*numbers: float) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    return "".join(f"<{name}>{number}</{name}>" for name, number in zip(names, numbers, strict=True))


def write_voc_image(year: Path, stem: str, *objects: str, size: str = SIZE, ending: str = ".jpg") -> None:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10)).save(year / "JPEGImages" / f"{stem}{ending}")
    (year / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    cat = OBJECT.format(name="cat", difficult=0, box=corners(3, 2, 6, 10))
    hard = OBJECT.format(name="dog", difficult=1, box=corners(1, 1, 20, 10))
    write_voc_image(tmp_path / "VOC2007", "000005", cat, hard)
    write_voc_image(tmp_path / "VOC2012", "2008_000008", size="", ending=".png")
    (tmp_path / "VOC2007/ImageSets/Main/trainval.txt").write_text("000005\n")
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_text("000005\n")
    (tmp_path / "VOC2012/ImageSets/Main/trainval.txt").write_text("2008_000008\n\n")
    return tmp_path


def read_voc_split(root: Path, **options: Any) -> Split:
    return assembly.build_split(VocData(format="voc", root=root, **options), "train")


def test_voc_both_years(devkit: Path) -> None:
    split = read_voc_split(devkit)
    assert split.class_names == VOC_CLASSES
    assert len(split) == 2
    first, second = split.records
    assert first.boxes.tolist() == [[2, 1, 6, 10]]  # VOC counts pixels from 1 and includes both ends
    assert split.class_names[int(first.labels[0]) - 1] == "cat"
    assert [item["iscrowd"] for item in first.truth] == [0, 1]  # the difficult dog is only for evaluation
    assert (second.size, len(second.boxes)) == ((10, 20), 0)  # its size is read from the image
    assert split.read(1).shape == (3, 10, 20)


def test_voc_list_of_one_class(devkit: Path) -> None:
    listing = devkit / "VOC2007/ImageSets/Main/cat_train.txt"
    listing.write_text("000005  1\n000009 -1\n")
    assert len(read_voc_split(devkit, train=["VOC2007/ImageSets/Main/cat_train.txt"])) == 1


def test_voc_names_with_spaces_and_repeated_names(devkit: Path) -> None:
    write_voc_image(devkit / "VOC2007", "img 1")
    write_voc_image(devkit / "VOC2007", "img")
    names = ["000005", "img 1", "000005", "img -1", "img 0"]
    (devkit / "VOC2007/ImageSets/Main/trainval.txt").write_text("\n".join(names))
    split = read_voc_split(devkit, train=["VOC2007/ImageSets/Main/trainval.txt", "VOC2007/ImageSets/Main/test.txt"])
    assert [path.name for path in split.read.paths] == ["000005.jpg", "img 1.jpg", "img.jpg"]  # type: ignore[attr-defined]


def test_voc_names_in_folders(devkit: Path) -> None:
    for part in ("Annotations", "JPEGImages"):
        (devkit / "VOC2007" / part / "sub.set").mkdir()
    write_voc_image(devkit / "VOC2007", "sub.set/img.1")
    (devkit / "VOC2007/ImageSets/Main/trainval.txt").write_text("sub.set/img.1\n")
    split = read_voc_split(devkit, train=["VOC2007/ImageSets/Main/trainval.txt"])
    assert [path.name for path in split.read.paths] == ["img.1.jpg"]  # type: ignore[attr-defined]


def test_voc_other_classes(devkit: Path) -> None:
    split = read_voc_split(devkit, classes=["dog", "cat"])
    assert split.records[0].labels.tolist() == [2]
    with pytest.raises(DataError, match=r"no object of the classes zebra.*; its objects are cat, dog; name these"):
        read_voc_split(devkit, classes=["zebra"])


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("VOC2007/ImageSets/Main/trainval.txt", None, "there is no list"),
        (
            "VOC2007/ImageSets/Main/trainval.txt",
            "000005\nthe quick brown\n",
            "one image name per line, but it has 'the quick brown'",
        ),
        ("VOC2007/Annotations/000005.xml", None, "there is no annotation"),
        ("VOC2007/Annotations/000005.xml", "<annotation>", "cannot be read"),
        ("VOC2007/JPEGImages/000005.jpg", None, "there is no image"),
    ],
)
def test_voc_faults(devkit: Path, path: str, content: str | None, message: str) -> None:
    if content is None:
        (devkit / path).unlink()
    else:
        (devkit / path).write_text(content)
    with pytest.raises(DataError, match=message):
        read_voc_split(devkit)


def test_voc_list_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("000005\n")
    with pytest.raises(DataError, match="should be in ImageSets/Main"):
        read_voc(lists=[tmp_path / "names.txt"], root=tmp_path)


def test_voc_unusable_boxes_are_counted(devkit: Path) -> None:
    bad = [
        OBJECT.format(name="cat", difficult=0, box=corners(5, 5, 2, 2)),
        OBJECT.format(name="cat", difficult=0, box="<xmin>a</xmin>"),
        OBJECT.format(name="cat", difficult=0, box=corners(15, 1, 30, 10)),
    ]
    write_voc_image(devkit / "VOC2007", "000005", *bad)
    split = read_voc_split(devkit)
    assert split.records[0].boxes.tolist() == [[14, 0, 20, 10]]
    notes = " ".join(split.notes)
    assert "clipped" in notes
    assert "not four finite numbers" in notes
    assert "no area" in notes


def frame(name: str, *labels: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "labels": list(labels) or None}


def label(category: str, *box: float, **more: Any) -> dict[str, Any]:
    return {"category": category, "box2d": dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)), **more}


@pytest.fixture
def bdd(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / name)
    return tmp_path


def read(root: Path, content: Any, **options: Any) -> Split:
    (root / "train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    data = Bdd100kData(format="bdd100k", root=root, train="train.json", train_images="images", **options)
    return assembly.build_split(data, "train")


def test_bdd_both_formats(bdd: Path) -> None:
    lane = {"category": "lane", "poly2d": [{"vertices": [[0, 0], [1, 1]]}]}
    frames = [
        frame("a.jpg", label("person", 1, 2, 5, 8), label("car", 0, 0, 9, 9, attributes={"crowd": True}), lane),
        frame("b.jpg"),
    ]
    for content in (frames, {"frames": frames}):
        split = read(bdd, content)
        assert split.class_names == BDD_CLASSES
        assert [len(record.boxes) for record in split.records] == [1, 0]
        assert split.records[0].boxes.tolist() == [[1, 2, 5, 8]]
        assert split.records[0].labels.tolist() == [1]  # the format of 2018 calls pedestrians persons
        assert [item["iscrowd"] for item in split.records[0].truth] == [0, 1]
        assert split.records[1].size == (10, 20)


def test_bdd_own_classes(bdd: Path) -> None:
    split = read(bdd, [frame("a.jpg", label("person", 1, 2, 5, 8), label("trailer", 1, 1, 3, 3))], classes=["person"])
    assert split.class_names == ("person",)
    assert len(split.records[0].boxes) == 1
    assert any("category_id is not among" in note for note in split.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ({"images": []}, "list of frames"),
        ([{"labels": []}], "each with a name"),
        ([frame("a.jpg", label("kangaroo", 0, 0, 5, 5))], "no box of the classes pedestrian"),
        ([frame("c.jpg", label("car", 0, 0, 5, 5))], "are missing"),
    ],
)
def test_bdd_faults(bdd: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(bdd, content)
    with pytest.raises(DataError, match="there is no annotation file"):
        read_bdd100k(labels=bdd / "nothing.json", images=bdd)


def test_bdd_malformed_boxes_are_counted(bdd: Path) -> None:
    broken = {"category": "car", "box2d": {"x1": 1, "y1": None, "x2": 3}}
    split = read(bdd, [frame("a.jpg", label("car", 0, 0, 5, 5), broken)])
    assert any("not four finite numbers" in note for note in split.notes)
