"""What is wrong with a recipe, in the user's words: the field as typed, what was expected, what came."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_SHOWN = 60  # characters of a value that a message repeats at most

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One field's problem. ``path`` is what the user typed, or left out."""

    path: Path
    message: str


def problems(error: ValidationError, data: object, model: type[BaseModel]) -> list[Problem]:
    """The problems of a failed validation, one per field, in pydantic's order.

    A field that may be several things gives one pydantic error for each of them. They become one problem; and where
    the value got far enough into one of them to have a problem below, the others are not worth saying.

    Args:
        error: what pydantic raised.
        data: what was validated.
        model: the model it was validated against.
    """
    schema = model.model_json_schema()
    by_field: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(_as_typed(detail, data), []).append(detail)
    parents = {path[:end] for path in by_field for end in range(len(path))}
    return [
        Problem(path, _sentence(path, details, data, schema))
        for path, details in by_field.items()
        if path not in parents
    ]


def _as_typed(detail: ErrorDetails, data: object) -> Path:
    """The path without the names that pydantic adds for the members of a union.

    An element that is not in the data is such a name, except for a missing field's own.
    """
    path: list[str | int] = []
    for element in detail["loc"]:
        found, below = _step(data, element)
        if found:
            path.append(element)
            data = below
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(str(detail["ctx"]["discriminator"]).strip("'"))
    return tuple(path)


def _step(data: object, element: str | int) -> tuple[bool, object]:
    """Whether the data has this key or index, and what is there."""
    if isinstance(data, Mapping) and element in data:
        return True, data[element]
    if isinstance(data, (list, tuple)) and isinstance(element, int) and element < len(data):
        return True, data[element]
    return False, None


def _sentence(path: Path, details: Sequence[ErrorDetails], data: object, schema: Mapping[str, object]) -> str:
    """One field's messages as one, and the value that came."""
    first, *others = (_message(detail, path, data, schema) for detail in details)
    return " or ".join([first, *(text.removeprefix("input should be ") for text in others)]) + _value(details[0])


def _message(detail: ErrorDetails, path: Path, data: object, schema: Mapping[str, object]) -> str:
    """Pydantic's message in this tool's words."""
    match detail["type"]:
        case "extra_forbidden":
            known = _fields(schema, path[:-1], data)
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            return "unknown field; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
        case "missing" | "union_tag_not_found":
            return "missing; this field is required"
        case "union_tag_invalid":
            return f"input should be one of {detail['ctx']['expected_tags']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "input should be a mapping of fields"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "bool_parsing" | "int_parsing" | "float_parsing" | "int_from_float":
            text = detail["msg"].partition(",")[0]
        case _:
            text = detail["msg"]
    return text[0].lower() + text[1:]


def _value(detail: ErrorDetails) -> str:
    """`` (got VALUE)``, or nothing where there is no value or the message has it already."""
    if detail["type"] in ("extra_forbidden", "missing", "union_tag_not_found", "value_error"):
        return ""
    value = detail["ctx"]["tag"] if detail["type"] == "union_tag_invalid" else detail["input"]
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return f" (got {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + '...'})"


def _fields(schema: Mapping[str, object], path: Path, data: object) -> list[str]:
    """Names of the fields that may stand in the mapping at ``path``."""
    node = _resolved(schema, schema, data)
    for element in path:
        _, data = _step(data, element)
        node = _resolved(schema, _mapping(_mapping(node.get("properties")).get(str(element))), data)
    return list(_mapping(node.get("properties")))


def _resolved(root: Mapping[str, object], node: Mapping[str, object], data: object) -> Mapping[str, object]:
    """The JSON schema of a mapping: references followed, and of several the one that the data's tag names."""
    if "discriminator" in node:
        discriminator = _mapping(node["discriminator"])
        tag = _mapping(data).get(str(discriminator["propertyName"]))
        node = {"$ref": _mapping(discriminator["mapping"]).get(str(tag))}
    members = node.get("anyOf")
    for member in members if isinstance(members, list) else ():
        if "$ref" in member or "discriminator" in member:
            return _resolved(root, member, data)
    reference = node.get("$ref")
    return _mapping(_mapping(root["$defs"]).get(str(reference).rpartition("/")[2])) if reference else node


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
