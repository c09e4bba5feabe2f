"""Reads YOLO's ``data.yaml``, or a text file of class names, and finds the images that they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gdetkd_cli import yaml_text
from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind

_MOST_BYTES = 500_000  # of a file of names; PyYAML takes seconds for it


@dataclass(frozen=True)
class YoloConfig:
    """What ``data.yaml`` states.

    Attributes:
        names: class names by class number.
        train, val: folders of images or lists of images, as written; None if the file does not name them.
        folder: ``path``, from which they start, as written.
        key_points: whether the rows of the label files have key points after the box.
    """

    file: Path
    names: Mapping[int, str]
    train: tuple[str, ...] | None = None
    val: tuple[str, ...] | None = None
    folder: str = ""
    key_points: bool = False

    def find_sources(self, which: Literal["train", "val"]) -> list[Path]:
        """Finds the folders and lists of a split.

        Each is searched from ``path`` and from the file's own folder, also without leading ``../``, because exporting
        tools write paths of other machines and folders.

        Raises:
            DataError: the file does not name them, or they do not exist.
        """
        entries = self.train if which == "train" else self.val
        if not entries:
            advice = ", or `data.val: null` to hold out every tenth training image" if which == "val" else ""
            raise DataError(f"{self.file} names no {which} images; add `{which}:` to it, or set data.{which}{advice}")
        return [self._find_source(entry) for entry in entries]

    def _find_source(self, entry: str) -> Path:
        own = self.file.parent
        stripped = entry
        while stripped.startswith("../"):
            stripped = stripped[3:]
        candidates = [base / each for each in (entry, stripped) for base in (own / self.folder, own)]
        for path in candidates:
            if os.path.exists(path):  # unlike Path.exists, also false for impossible names
                self._check_below(path)
                return path
        raise DataError(
            f"{self.file} names the images {entry}, but there is no {candidates[0]}{name_kind(candidates[0])}; correct "
            "`path`, `train` and `val` in it, or set data.train and data.val"
        )

    def _check_below(self, source: Path) -> None:
        """Checks that a folder of images is not a folder above the file, such as /, whose search would not end."""
        if source.resolve() in self.file.resolve().parent.parents:
            raise DataError(f"{self.file} names the images {source}, a folder above its own; name a folder inside it")


def read_yolo_config(file: Path) -> YoloConfig:
    """Reads ``data.yaml``, or the class names in a text file such as ``classes.txt`` or ``obj.names``, one a line.

    Raises:
        DataError: the file is missing, too large, not UTF-8, not valid, or has no class names.
    """
    if not os.path.isfile(file):
        raise DataError(
            f"there is no file {file}{name_kind(file)}; give YOLO's data.yaml, or a text file of class names"
        )
    if file.stat().st_size > _MOST_BYTES:
        raise DataError(f"{file} should be YOLO's data.yaml or a list of class names, but it is too large; replace it")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} should be text in UTF-8, but it is not (byte {error.start}); convert it") from error
    if file.suffix.lower() in (".yaml", ".yml"):
        return _parse_yaml(file, text)
    names = [line.strip() for line in text.split("\n") if line.strip()]
    if not names:
        raise DataError(f"{file} has no class names; write one a line, in the order of their numbers")
    return YoloConfig(file, dict(enumerate(names)))


def _parse_yaml(file: Path, text: str) -> YoloConfig:
    try:
        fields, node = yaml_text.parse(text)
    except yaml_text.YamlError as error:
        place = file if error.line is None else f"{file}:{error.line}"
        raise DataError(f"{place}: not valid YAML: {error}; correct the file") from error
    nodes = {key.value: value for key, value in node.value} if isinstance(node, MappingNode) else {}
    if not isinstance(fields, dict) or "names" not in nodes:
        raise DataError(f"{file} should be YOLO's data.yaml with `names`, `train` and `val`; give another file")
    names = _read_names(file, nodes["names"])
    if isinstance(fields.get("nc"), int) and fields["nc"] != len(names):
        raise DataError(f"{file} has {len(names)} names, but nc: {fields['nc']}; correct the one that is wrong")
    folder = fields.get("path")
    return YoloConfig(
        file=file,
        names=names,
        train=_read_entries(file, "train", fields.get("train")),
        val=_read_entries(file, "val", fields.get("val")),
        folder=folder if isinstance(folder, str) else "",
        key_points=fields.get("kpt_shape") is not None,
    )


def _read_names(file: Path, node: Node) -> dict[int, str]:
    """Reads names from a list, or a mapping from numbers, as they are written: ``no`` is a name, not false."""
    if isinstance(node, SequenceNode) and node.value and all(isinstance(item, ScalarNode) for item in node.value):
        return {number: item.value for number, item in enumerate(node.value)}
    pairs = node.value if isinstance(node, MappingNode) else []
    if pairs and all(isinstance(part, ScalarNode) for pair in pairs for part in pair):
        numbers = [_read_number(key.value) for key, _ in pairs]
        if None not in numbers and len(set(numbers)) == len(numbers):
            return {int(key.value): name.value for key, name in pairs}
    raise DataError(
        f"{file}: `names` should be a list of class names, or a mapping from numbers (0: cat, 1: dog); correct it"
    )


def _read_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _read_entries(file: Path, key: str, value: object) -> tuple[str, ...] | None:
    if value is None or value == "":
        return None
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{file}: `{key}` should be a folder of images, a .txt list, or a list of them; correct it")
    return tuple(entries)


def list_images(listing: Path, *, root: Path) -> list[Path]:
    """Reads a text file that names one image per line.

    A name starts from the list's folder or from ``root``, or has one folder in front of it, as in darknet's
    ``data/obj_train_data/1.jpg``.

    Raises:
        DataError: the list is not UTF-8, names no image, or names images that do not exist.
    """
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{listing} should be a list of images in UTF-8, but byte {error.start} is not; replace it"
        ) from error
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise DataError(f"{listing} names no images; write one a line")
    found = [_find_image(entry, (listing.parent, root)) for entry in entries]
    missing = [entry for entry, path in zip(entries, found, strict=True) if path is None]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(entries)} images that {listing} names are missing, {missing[0]} first"
            f"{name_kind(missing[0])}; add them, or correct the list"
        )
    return [path for path in found if path is not None]


def _find_image(entry: str, bases: Sequence[Path]) -> Path | None:
    rest = entry.partition("/")[2]
    candidates = (base / name for name in [entry, *([rest.lstrip("/")] if rest else [])] for base in bases)
    return next(filter(os.path.isfile, candidates), None)
