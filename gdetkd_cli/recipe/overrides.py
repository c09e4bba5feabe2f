"""``--set field=value``: changes to a recipe's plain data, before it is validated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe import yaml_text


@dataclass(frozen=True)
class Override:
    """One ``--set``. ``path`` holds the keys as typed; a list index is a string of digits here."""

    text: str
    path: tuple[str, ...]
    value: object


def parse_override(text: str) -> Override:
    """Reads ``a.b=c``; the value is YAML, and nothing after the sign means null.

    Raises:
        RecipeError: no ``=``, an empty key, or a value that is not YAML.
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


def apply(data: object, overrides: Sequence[Override]) -> object:
    """The data with every override applied, in order. ``data`` itself stays as it is.

    Raises:
        RecipeError: a path leads through a plain value, or beside the elements of a list.
    """
    for override in overrides:
        data = _replaced(data, override, 0)
    return data


def _replaced(node: object, override: Override, depth: int) -> object:
    """A copy of ``node``, which is at the first ``depth`` keys of the override's path, with the change below it.

    Containers on the way are copied, not changed: YAML anchors can make two fields one object.
    """
    if depth == len(override.path):
        return override.value
    key = override.path[depth]
    here = ".".join(override.path[:depth])
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            expected = f"an index from 0 to {len(node) - 1}" if node else "no index, for it is empty"
            raise RecipeError(f"--set {override.text}: {here} is a list of {len(node)}; expected {expected}, got {key}")
        items = list(node)
        items[int(key)] = _replaced(items[int(key)], override, depth + 1)
        return items
    if node is None and key.isdigit():
        raise RecipeError(
            f"--set {override.text}: the recipe does not spell out the list {here}; set it whole: --set '{here}=[...]'"
        )
    if node is not None and not isinstance(node, dict):
        raise RecipeError(
            f"--set {override.text}: {here} is {node!r}, which has no fields; "
            f"set it whole: --set '{here}={{{key}: ...}}'"
        )
    fields = node or {}
    return {**fields, key: _replaced(fields.get(key), override, depth + 1)}
