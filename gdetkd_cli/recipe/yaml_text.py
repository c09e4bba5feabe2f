"""YAML for recipes: plain data only, ``3e-4`` is a number, and a repeated key is an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

# PyYAML follows YAML 1.1, where an exponent needs a point and a sign: it reads 3e-4 as a string.
_EXPONENT = re.compile(r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects repeated keys and reads dates as strings."""

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, ScalarNode)):
            if key.value in seen:
                raise ComposerError(None, None, f"the key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that ``_Loader`` would read as numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


class YamlError(ValueError):
    """Invalid YAML. ``line`` counts from 1; None if unknown."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


def parse(text: str) -> tuple[object, Node | None]:
    """Reads one document.

    Returns:
        The value and its node tree with line numbers; None and None for an empty document.

    Raises:
        YamlError: the text is not YAML, repeats a key, or has a tag that is not plain data.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise YamlError(error.problem or "unreadable", line) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number such as 0b_ that int() cannot parse
        raise YamlError(str(error).splitlines()[0], None) from error


def dump(value: object) -> str:
    """Returns plain data as YAML in block style, with its keys in order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def find_line(node: Node, path: Sequence[str | int]) -> int:
    """Returns the line, from 1, of the field at ``path`` or of its nearest existing parent."""
    line = node.start_mark.line
    for key in path:
        child = _find_child(node, key)
        if child is None:
            break
        line, node = child
    return line + 1


def has_field(node: Node, path: Sequence[str | int]) -> bool:
    """Whether the document contains the field at ``path``."""
    for key in path:
        child = _find_child(node, key)
        if child is None:
            return False
        _, node = child
    return True


def _find_child(node: Node, key: str | int) -> tuple[int, Node] | None:
    """Returns the child's line, from 0, and node. Merged (``<<``) pairs come first, so the last pair of a key wins."""
    if isinstance(node, MappingNode):
        for name, value in reversed(node.value):
            if name.value == str(key):
                return name.start_mark.line, value
    if isinstance(node, SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line, node.value[key]
    return None
