"""Reads class names and the image size from the metadata of a model file."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

OWN = "gdetkd.classes"  # gdetkd's key: a JSON list
ARCHITECTURE = "gdetkd.architecture"  # gdetkd's key: the JSON description that rebuilds a detector
_YOLO = "names"  # ultralytics' key: {0: "person", ...}, in ONNX as the text of a Python dictionary


def parse_notes(text: str) -> dict[str, Any]:
    """Parses a file's metadata; empty if it is not a JSON object, as other tools' own formats are not."""
    try:
        notes = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def read_class_names(notes: Mapping[str, object]) -> tuple[str, ...]:
    """Reads the names in the order of the labels; empty if a file's metadata has none."""
    own, names = notes.get(OWN), notes.get(_YOLO)
    try:
        if isinstance(own, str):
            names = json.loads(own)
        elif isinstance(names, str):
            names = ast.literal_eval(names)
        if isinstance(names, dict):
            names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last: too many brackets
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def read_size(value: object) -> tuple[int, int] | None:
    """Reads ultralytics' ``imgsz``, [height, width] in pixels, in ONNX as text; None if it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None
