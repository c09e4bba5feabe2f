"""The names of a model's classes, where its file tells them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping

OWN = "gdetkd.classes"  # what this tool writes: a JSON list
_YOLO = "names"  # what ultralytics writes: {0: "person", ...}, in ONNX as Python prints it


def class_names_in(notes: Mapping[str, object]) -> tuple[str, ...]:
    """Names in the order of the labels; empty where the notes in a file do not tell."""
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
