"""``--set field=value``: changes to a recipe's plain data before validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gdetkd_cli import yaml_text
from gdetkd_cli.errors import RecipeError


@dataclass(frozen=True)
class Override:
    """One ``--set``. ``path`` holds the keys as typed; a list index is a string of digits."""

    text: str
    path: tuple[str, ...]
    value: object


def parse_override(text: str) -> Override:
    """Parses ``a.b=c``, where the value is YAML and an empty value means null.

    Raises:
        RecipeError: ``=`` is missing, a key is empty, or the value is not YAML.
    """
    field, sign, value = text.partition("=")
    path = tuple(field.strip().split("."))
    if not sign or not all(path):
        raise RecipeError(f"--set {text}: expected field=value, for example --set train.steps=2000")
    try:
        parsed, _ = yaml_text.parse(value)
    except yaml_text.YamlError as error:
        raise RecipeError(f"--set {text}: the value is not valid YAML: {error}") from error
    return Override(text, path, parsed)


def apply_overrides(data: object, overrides: Sequence[Override]) -> object:
    """Returns a copy of the data with every override applied, in order.

    Raises:
        RecipeError: a path runs through a plain value, or names a list index that does not exist.
    """
    for override in overrides:
        data = _replace(data, override, 0)
    return data


def _replace(node: object, override: Override, depth: int) -> object:
    """Returns a copy of ``node``, found at the first ``depth`` keys of the override's path, with the change below it.

    Copies containers instead of changing them, because YAML anchors can make two fields one object.
    """
    if depth == len(override.path):
        return override.value
    key = override.path[depth]
    here = ".".join(override.path[:depth])
    if isinstance(node, list):
        if not _is_index(key) or int(key) >= len(node):
            expected = f"expected an index from 0 to {len(node) - 1}, got {key}" if node else f"it has no index {key}"
            raise RecipeError(f"--set {override.text}: {here} is a list of length {len(node)}; {expected}")
        items = list(node)
        items[int(key)] = _replace(items[int(key)], override, depth + 1)
        return items
    if node is None and _is_index(key):
        raise RecipeError(
            f"--set {override.text}: the recipe does not contain the list {here}; set the whole list: "
            f"--set '{here}=[...]'"
        )
    if node is not None and not isinstance(node, dict):
        raise RecipeError(
            f"--set {override.text}: {here} is {node!r}, which has no fields; set the whole block: "
            f"--set '{here}={{{key}: ...}}'"
        )
    fields = node or {}
    return {**fields, key: _replace(fields.get(key), override, depth + 1)}


def _is_index(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10
