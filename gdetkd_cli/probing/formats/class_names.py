"""Reads class names from the metadata of a model file."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping

OWN = "gdetkd.classes"  # gdetkd's key: a JSON list
_YOLO = "names"  # ultralytics' key: {0: "person", ...}, in ONNX as the text of a Python dictionary


def read_class_names(notes: Mapping[str, object]) -> tuple[str, ...]:
    """Reads the names in the order of the labels; empty if a file's metadata has none."""
    if isinstance(notes.get(OWN), str):
        return tuple(json.loads(str(notes[OWN])))
    names = notes.get(_YOLO)
    if isinstance(names, str):
        try:
            names = ast.literal_eval(names)
        except (ValueError, SyntaxError):
            return ()
    if isinstance(names, dict):
        try:
            names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
        except ValueError:
            return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
