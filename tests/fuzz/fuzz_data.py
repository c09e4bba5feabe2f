"""COCO, YOLO, VOC and BDD100K annotations, and image files."""

from __future__ import annotations

import json
import math
import random
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import AcceptedSilentlyError, Target, make_once
from mutate import ODD_VALUES, deepen, get, mutate_bytes, mutate_tree, replace
from PIL import Image
from pycocotools import mask as masks

from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.readers.bdd100k import read_bdd100k
from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.readers.data_yaml import read_yolo_config
from gdetkd_cli.data.readers.layout import find_detection_files
from gdetkd_cli.data.readers.voc import read_object_names, read_voc
from gdetkd_cli.data.readers.yolo import read_yolo
from gdetkd_cli.data.readers.yolo_layout import find_yolo
from gdetkd_cli.data.split import Split
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.errors import DataError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.structures import Detections

_SIZES = ((40, 60), (64, 64), (24, 80))  # (height, width) of the images
_CLASSES = ("car", "bus", "bike")
_NO_BOXES: tuple[Any, ...] = (
    None, [], [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, [4]], [1, 2, 3, True], {"x": 1}, "1 2 3 4", 10**400, [10**400] * 4,
    [float("nan")] * 4, [0, 0, float("inf"), 5], [[1, 2, 3, 4]], [1, 2, 3, 4, 5],
)  # fmt: skip


def _write_images(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    names = []
    for number, (height, width) in enumerate(_SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        names.append(f"{number}.jpg")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def _coco(folder: Path) -> dict[str, Any]:
    names = _write_images(folder / "images")
    boxes = ([2, 3, 20, 10], [10, 5, 30, 30], [0, 0, 24, 24], [5.5, 2.25, 10, 12], [1, 1, 8, 8], [20, 4, 15, 9])
    whole = np.zeros(_SIZES[1], dtype=np.uint8, order="F")
    whole[5:30, 10:40] = 1
    compressed = masks.encode(whole)
    outlines: tuple[Any, ...] = (
        [[2, 3, 22, 3, 22, 13]],
        {"size": list(_SIZES[1]), "counts": compressed["counts"].decode()},
        [[0, 0, 24, 0, 24, 24, 0, 24]],
        {"size": list(_SIZES[0]), "counts": [500, 100, _SIZES[0][0] * _SIZES[0][1] - 600]},
        None,
        [],
    )
    return {
        "images": [
            {"id": number + 1, "file_name": name, "height": height, "width": width}
            for number, (name, (height, width)) in enumerate(zip(names, _SIZES, strict=True))
        ],
        "annotations": [
            {"id": number, "image_id": (1, 2, 3, 1, 2, 3)[number], "category_id": 1 + number % 3, "bbox": list(box),
             "area": box[2] * box[3], "iscrowd": int(number == 4), "segmentation": outline}
            for number, (box, outline) in enumerate(zip(boxes, outlines, strict=True))
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(_CLASSES, start=1)],
    }  # fmt: skip


def _write_json(rng: random.Random, path: Path, tree: Any) -> None:
    """Writes a mutated tree, or mutated bytes of the whole one."""
    kind = rng.random()
    if kind < 0.75:
        content = json.dumps(mutate_tree(rng, tree)).encode()
    elif kind < 0.97:
        content = mutate_bytes(rng, json.dumps(tree, indent=rng.choice((None, 1))).encode())
    else:
        content = json.dumps(deepen(900)).replace("[", "[" * 200).encode() + rng.choice((b"", b"\xff", b"]" * 10**5))
    path.write_bytes(content)


def check_split(split: Split) -> None:
    """Checks what a reader promises about its records."""
    for record in split.records:
        height, width = record.size
        limits = torch.tensor([width, height, width, height])
        boxes = record.boxes
        if not (torch.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= limits).all()):
            raise AcceptedSilentlyError(f"boxes outside the image of {record.size}: {boxes.tolist()}")
        if not ((boxes[:, 2:] - boxes[:, :2]) > 0).all():
            raise AcceptedSilentlyError(f"boxes without area: {boxes.tolist()}")
        if len(boxes) != len(record.labels) or not all(1 <= label <= len(split.class_names) for label in record.labels):
            raise AcceptedSilentlyError(f"labels {record.labels.tolist()}")
        if not isinstance(record.image_id, int) or isinstance(record.image_id, bool):
            raise AcceptedSilentlyError(f"image id {record.image_id!r}")
        if not all(math.isfinite(float(item["area"])) and float(item["area"]) >= 0 for item in record.truth):  # type: ignore[arg-type]
            raise AcceptedSilentlyError(f"areas {[item['area'] for item in record.truth]}")
    for name in (*split.class_names, *split.notes):
        name.encode()


def run_coco(rng: random.Random, folder: Path, tree: Any) -> None:
    path = folder / "train.json"
    _write_json(rng, path, tree)
    find_detection_files(folder)
    check_split(read_coco(annotations=path, images=folder / "images", outlines=rng.random() < 0.5))


def run_wrong_box(rng: random.Random, folder: Path, tree: Any) -> None:
    """Writes something else where a box belongs; it must be counted in a note."""
    wrong = replace(tree, ("annotations", rng.randrange(6), "bbox"), rng.choice(_NO_BOXES))
    path = folder / "train.json"
    path.write_text(json.dumps(wrong), encoding="utf-8")
    split = read_coco(annotations=path, images=folder / "images")
    check_split(split)
    if not any("dropped" in note for note in split.notes):
        raise AcceptedSilentlyError(f"box {wrong['annotations']}")
    raise DataError(split.notes[-1])


def run_training(rng: random.Random, folder: Path, tree: Any) -> None:
    """Trains on mutated annotations and odd image sizes: pasting, multi-scale and evaluation, which are native code."""
    tree = mutate_tree(rng, tree) if rng.random() < 0.7 else tree
    if rng.random() < 0.7:
        place = ("annotations", rng.randrange(6), "segmentation")
        with suppress(LookupError, TypeError):  # an earlier mutation removed it
            tree = _mutate_outline(rng, tree, place)
    path = folder / "train.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    split = read_coco(annotations=path, images=folder / "images", outlines=True)
    check_split(split)
    augmentation = build_augmentation(flip=0.5, photometric=False, multi_scale=[32, 64, 100], max_size=200)
    dataset = DetectionDataset(split=split, augmentation=augmentation, seed=0, cache_mb=10, copy_paste=1.0)
    for index in range(len(split)):
        image, target, *_ = dataset[0, index]
        assert image.dim() == 3 and len(target.boxes) == len(target.labels)
    found = {
        record.image_id: Detections(record.boxes, torch.full((len(record.labels),), 0.5), record.labels)
        for record in split.records
    }
    evaluate_coco(split.records, split.class_names, found)


def _mutate_outline(rng: random.Random, tree: Any, place: tuple[Any, ...]) -> Any:
    outline = get(tree, place)
    if isinstance(outline, dict) and isinstance(outline["counts"], str) and rng.random() < 0.7:
        counts = mutate_bytes(rng, outline["counts"].encode()).decode("latin-1")
        return replace(tree, (*place, "counts"), counts)
    return replace(tree, place, mutate_tree(rng, outline, (*ODD_VALUES, 1e30, [10**9] * 8, 5000, 2**32)))


def _voc(folder: Path) -> dict[str, bytes]:
    names = _write_images(folder / "JPEGImages")
    files = {"ImageSets/Main/train.txt": "".join(f"{Path(name).stem}\n" for name in names)}
    for name, (height, width) in zip(names, _SIZES, strict=True):
        objects = "".join(
            f"<object><name>{kind}</name><difficult>{number % 2}</difficult><bndbox><xmin>{number + 1}</xmin>"
            f"<ymin>2</ymin><xmax>{number + 15}</xmax><ymax>20</ymax></bndbox></object>"
            for number, kind in enumerate(("car", "bus", "cat"))
        )
        files[f"Annotations/{Path(name).stem}.xml"] = (
            f"<?xml version='1.0' encoding='utf-8'?><annotation><size><width>{width}</width><height>{height}</height>"
            f"</size>{objects}</annotation>"
        )
    return {name: text.encode() for name, text in files.items()}


_XML_TEXTS = (
    b"9" * 400, b"-1", b"nan", b"inf", b"1e999", b"x", b"", b"[1, 2]", b"<a/>", b"&x;", b"1_0", b"\xff",
    b"../../etc/passwd", b"\xe2\x80\xae", b"a" * 5000, b"<a>" * 3000, b"/dev/null", b"0",
)  # fmt: skip
_XML_HEADS = (
    b"<?xml version='1.0' encoding='utf-32'?>",
    b"<?xml version='1.0' encoding='nonsense'?>",
    b"<?xml version='1.0' encoding='utf-16'?>",
    b"<!DOCTYPE a [<!ENTITY x 'aaaaaaaaaa'><!ENTITY y '" + b"&x;" * 50 + b"'><!ENTITY z '" + b"&y;" * 50 + b"'>]>",
    b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>",
)


def run_voc(rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    changed = dict(files)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(files))
        content = changed[name]
        kind = rng.randrange(4)
        if kind == 0:
            changed[name] = mutate_bytes(rng, content)
        elif kind == 1 and name.endswith(".xml"):
            changed[name] = rng.choice(_XML_HEADS) + content.partition(b"?>")[2].replace(b"car", b"&z;")
        elif name.endswith(".xml"):
            pieces = content.split(b">")
            at = rng.choice([i for i, piece in enumerate(pieces) if not piece.startswith(b"<") and b"<" in piece])
            pieces[at] = rng.choice(_XML_TEXTS) + pieces[at][pieces[at].index(b"<") :]
            changed[name] = b">".join(pieces)
        else:
            changed[name] = b"\n".join(rng.choice((line, *_XML_TEXTS)) for line in content.split(b"\n"))
    for name, content in changed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    listing = folder / "ImageSets" / "Main" / "train.txt"
    read_object_names([listing])
    check_split(read_voc(lists=[listing], root=folder if rng.random() < 0.8 else folder / "elsewhere"))


def _yolo(folder: Path) -> dict[str, bytes]:
    """The files of a small data set; all images but the last are also in a list."""
    names = _write_images(folder / "images" / "train")
    rows = ("0 0.5 0.5 0.25 0.5", "1 0.1 0.2 0.5 0.2 0.5 0.8", "2 0.9 0.5 0.2 0.4")
    listed = "".join(f"./images/train/{name}\n" for name in names[:-1])
    files = {
        "data.yaml": "path: .\ntrain: images/train\nval: [train.txt]\nnc: 3\nnames: {0: car, 1: bus, 2: x}\n",
        "train.txt": listed,
    }
    for name in names:
        files[f"labels/train/{Path(name).stem}.txt"] = "\n".join(rows) + "\n"
    return {name: text.encode() for name, text in files.items()}


_YAML_TEXTS = (
    b"/", b"..", b"../..", b"/dev/null", b"/proc", b"labels", b"train.txt", b"x" * 5000, b"[" * 300, b"*a", b"yes",
    b"!!python/name:os.system x", b"{}", b"[]", b"[[images/train]]", b"~", b"1e999", b"9" * 6000, b"\x00", b"\xff",
    b"\xe2\x80\xae", b"&a [*a]",
)  # fmt: skip
_WORDS = (
    b"9" * 400, b"-1", b"nan", b"-inf", b"1e999", b"1e308", b"x", b"1_0", b"0x1", b"\xff", b"\x00", b"\xe2\x80\xae",
    b"1,5", b"\xef\xbc\x91", b"0.5 " * 3000, b"1e-320", b"-0.0", b"True",
)  # fmt: skip


def _write_yolo(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _read_yolo(folder: Path, *, outlines: bool = False) -> Split:
    config = read_yolo_config(folder / "data.yaml")
    splits = [
        read_yolo(config=config, sources=config.find_sources(which), root=folder, outlines=outlines)
        for which in ("train", "val")
    ]
    for split in splits:
        check_split(split)
    return splits[0]


def run_yolo(rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    """Changes the YAML file, the list and the label files."""
    changed = dict(files)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(files))
        lines = changed[name].split(b"\n")
        at = rng.randrange(len(lines))
        if rng.random() < 0.4:
            changed[name] = mutate_bytes(rng, changed[name])
            continue
        if name == "data.yaml":
            key, _, value = lines[at].partition(b": ")
            lines[at] = rng.choice((key + b": " + rng.choice(_YAML_TEXTS), value, key, b"kpt_shape: [3, 2]"))
        elif name == "train.txt":
            lines[at] = rng.choice((*_XML_TEXTS, b"images/train/" + lines[at], b"/" + lines[at], b"labels/train/0.txt"))
        else:
            words = lines[at].split(b" ")
            words[rng.randrange(len(words))] = rng.choice(_WORDS)
            lines[at] = b" ".join(words)
        changed[name] = b"\n".join(lines)
    _write_yolo(folder, changed)
    find_yolo(folder)
    _read_yolo(folder, outlines=rng.random() < 0.5)


def run_wrong_row(rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    """Writes something else where a row belongs; it must be counted in a note."""
    name = rng.choice([name for name in files if name.startswith("labels")])
    words: list[bytes] = [b"0", b"0.5", b"0.5", b"0.25", b"0.5"]
    match rng.randrange(3):
        case 0:
            words[rng.randrange(5)] = rng.choice([word for word in _WORDS if word not in (b"1e-320", b"-0.0")])
        case 1:
            del words[rng.randrange(5)]
        case 2:
            words.append(b"0.9")
    row = b" ".join(words)
    _write_yolo(folder, files | {name: files[name] + row + b"\n"})
    split = _read_yolo(folder)
    if not any("dropped" in note and f"{name}:4" in note for note in split.notes):
        raise AcceptedSilentlyError(f"row {row!r}: {split.notes}")
    raise DataError(split.notes[0])


def _bdd(folder: Path) -> list[dict[str, Any]]:
    return [
        {"name": name, "attributes": {"weather": "clear"}, "labels": [
            {"category": kind, "attributes": {"crowd": kind == "rider"},
             "box2d": {"x1": 1.5, "y1": 2, "x2": 20, "y2": 21.5}}
            for kind in ("car", "person", "rider")
        ] + [{"category": "lane", "poly2d": []}]}
        for name in _write_images(folder / "images")
    ]  # fmt: skip


def run_bdd(rng: random.Random, folder: Path, tree: Any) -> None:
    path = folder / "train.json"
    _write_json(rng, path, tree)
    check_split(read_bdd100k(labels=path, images=folder / "images"))


def run_wrong_corner(rng: random.Random, folder: Path, tree: Any) -> None:
    """Writes something else where a corner or a box belongs; it must be counted in a note."""
    frame, label = rng.randrange(len(tree)), rng.randrange(3)
    place: tuple[Any, ...] = (frame, "labels", label, "box2d")
    if rng.random() < 0.7:
        wrong = replace(tree, (*place, rng.choice(("x1", "y1", "x2", "y2"))), rng.choice((*_NO_BOXES, "12", True)))
    else:
        wrong = replace(tree, place, rng.choice(_NO_BOXES[1:]))
    path = folder / "train.json"
    path.write_text(json.dumps(wrong), encoding="utf-8")
    split = read_bdd100k(labels=path, images=folder / "images")
    if not any("dropped" in note for note in split.notes):
        raise AcceptedSilentlyError(f"box {get(wrong, place)}")
    raise DataError(split.notes[-1])


TARGETS = [
    Target("coco", 3000, partial(make_once, make=_coco), run_coco),
    Target("coco-box", 500, partial(make_once, make=_coco), run_wrong_box),
    Target("yolo", 2000, partial(make_once, make=_yolo), run_yolo),
    Target("yolo-row", 500, partial(make_once, make=_yolo), run_wrong_row),
    Target("voc", 1500, partial(make_once, make=_voc), run_voc),
    Target("bdd100k", 1500, partial(make_once, make=_bdd), run_bdd),
    Target("bdd100k-box", 500, partial(make_once, make=_bdd), run_wrong_corner),
    Target("coco-training", 1500, partial(make_once, make=_coco), run_training, isolated=True),
]
