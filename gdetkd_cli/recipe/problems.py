"""Turns pydantic's validation errors into messages about the fields that the user typed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_SHOWN = 60  # maximum characters of a value in a message

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One field's problem. ``path`` is the field that the user typed or left out."""

    path: Path
    message: str


def describe_problems(error: ValidationError, data: object, model: type[BaseModel]) -> list[Problem]:
    """Describes a failed validation, with one problem per field, in pydantic's order.

    Pydantic reports one error per member of a union. They become one problem; errors in a field below replace it.
    """
    schema = model.model_json_schema()
    by_field: dict[Path, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(_find_typed_path(detail, data), []).append(detail)
    parents = {path[:end] for path in by_field for end in range(len(path))}
    return [
        Problem(path, _format_details(path, details, data, schema))
        for path, details in by_field.items()
        if path not in parents
    ]


def _find_typed_path(detail: ErrorDetails, data: object) -> Path:
    """Returns the path without the names that pydantic adds for members of a union.

    An element that is not in the data is such a name, unless the field itself is missing.
    """
    path: list[str | int] = []
    for element in detail["loc"]:
        exists, below = _get_child(data, element)
        if exists:
            path.append(element)
            data = below
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(str(detail["ctx"]["discriminator"]).strip("'"))
    return tuple(path)


def _get_child(data: object, element: str | int) -> tuple[bool, object]:
    """Returns whether the data has this key or index, and its value."""
    if isinstance(data, Mapping) and element in data:
        return True, data[element]
    if isinstance(data, (list, tuple)) and isinstance(element, int) and element < len(data):
        return True, data[element]
    return False, None


def _format_details(path: Path, details: Sequence[ErrorDetails], data: object, schema: Mapping[str, object]) -> str:
    """Joins the messages of one field and adds its value."""
    first, *others = (_format_detail(detail, path, data, schema) for detail in details)
    return " or ".join([first, *(text.removeprefix("input should be ") for text in others)]) + _format_value(details[0])


def _format_detail(detail: ErrorDetails, path: Path, data: object, schema: Mapping[str, object]) -> str:
    match detail["type"]:
        case "extra_forbidden":
            known = _list_fields(schema, path[:-1], data)
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            return "unknown field; " + (f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(known)}")
        case "missing" | "union_tag_not_found":
            return "this field is required"
        case "union_tag_invalid":
            return f"input should be one of {detail['ctx']['expected_tags']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "input should be a mapping of fields"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "int_type" | "int_parsing" | "int_from_float":
            return "input should be a whole number"
        case "bool_parsing" | "float_parsing":
            text = detail["msg"].partition(",")[0]
        case _:
            text = detail["msg"]
    return text[0].lower() + text[1:]


def _format_value(detail: ErrorDetails) -> str:
    """Returns `` (got VALUE)``, or nothing if the value is missing or already in the message."""
    if detail["type"] in ("extra_forbidden", "missing", "union_tag_not_found", "value_error"):
        return ""
    value = detail["ctx"]["tag"] if detail["type"] == "union_tag_invalid" else detail["input"]
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return f" (got {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + '...'})"


def _list_fields(schema: Mapping[str, object], path: Path, data: object) -> list[str]:
    """Lists the valid fields of the mapping at ``path``."""
    node = _resolve(schema, schema, data)
    for element in path:
        _, data = _get_child(data, element)
        node = _resolve(schema, _mapping(_mapping(node.get("properties")).get(str(element))), data)
    return list(_mapping(node.get("properties")))


def _resolve(root: Mapping[str, object], node: Mapping[str, object], data: object) -> Mapping[str, object]:
    """Follows references, and selects the union member that the data's tag names."""
    if "discriminator" in node:
        discriminator = _mapping(node["discriminator"])
        tag = _mapping(data).get(str(discriminator["propertyName"]))
        node = {"$ref": _mapping(discriminator["mapping"]).get(str(tag))}
    members = node.get("anyOf")
    for member in members if isinstance(members, list) else ():
        if "$ref" in member or "discriminator" in member:
            return _resolve(root, member, data)
    reference = node.get("$ref")
    return _mapping(_mapping(root["$defs"]).get(str(reference).rpartition("/")[2])) if reference else node


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
