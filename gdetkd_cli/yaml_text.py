"""YAML of recipes and of YOLO's ``data.yaml``: plain data only, ``3e-4`` is a number, and a repeated key is an error.

PyYAML follows YAML 1.1, which reads 1:30 in base 60 and 010 in base 8. Recipes read both as strings, so a field that
needs a number refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from gdetkd_cli.text import show_hidden

_INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^[-+]?(\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$"
    r"|^\.(nan|NaN|NAN)$"
)
_TAG = "tag:yaml.org,2002:"
_NUMBERS = {f"{_TAG}int": _INT, f"{_TAG}float": _FLOAT}
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
_MOST_NODES, _MOST_DEPTH = 10_000, 30  # of a document, with every alias written out


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects repeated keys and reads dates as strings."""

    yaml_constructors = {  # noqa: RUF012  # PyYAML's own pattern
        tag: function
        for tag, function in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _KINDS
    }

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
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, f"{_TAG}timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, _Dumper):
    for _tag, _pattern in _NUMBERS.items():
        _side.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


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
        YamlError: the text is not YAML, repeats a key, has a tag that is not plain data, contains itself, or is
            larger or deeper than a recipe can be.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _count_nodes(node, {})
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise YamlError(error.problem or "unreadable", line) from error
    except YamlError:
        raise
    except RecursionError as error:
        raise YamlError(f"nested more than {_MOST_DEPTH} levels deep", None) from error
    except KeyError as error:
        raise YamlError(f"{error.args[0]!r} is not true or false", None) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise YamlError(str(error).splitlines()[0], None) from error


def _count_nodes(node: Node, counts: dict[int, int], depth: int = 1) -> int:
    """Counts the nodes of a tree with its aliases written out; raises a YamlError if there are too many or no end."""
    line = node.start_mark.line + 1
    if counts.get(id(node)) == 0:
        raise YamlError("a block contains itself through its anchor", line)
    if depth > _MOST_DEPTH:
        raise YamlError(f"nested more than {_MOST_DEPTH} levels deep", line)
    if id(node) not in counts:
        counts[id(node)] = 0  # unfinished
        below = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        inner = below if isinstance(node, MappingNode | SequenceNode) else []
        counts[id(node)] = 1 + sum(_count_nodes(part, counts, depth + 1) for part in inner)
    if counts[id(node)] > _MOST_NODES:
        raise YamlError(f"more than {_MOST_NODES} values, with every alias written out", line)
    return counts[id(node)]


def dump(value: object) -> str:
    """Returns plain data as YAML in block style, with its keys in order."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if show_hidden(text, keep="\n") == text:
        return text
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)  # escapes all that is not ASCII


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
