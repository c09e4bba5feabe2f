"""Seeded mutations of bytes, texts and trees of plain data."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

_EDGES = (0, 1, 127, 128, 255)
_WORDS = (b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"NaN", b"1e999", b"-1", b"9" * 400, b"[" * 3000, b"\xc3\x28")

# Values of every kind that JSON can hold, and those that Python's parser accepts beside them.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    2**31,
    2**63,
    10**12,
    10**400,
    -(10**400),
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "x",
    "0",
    "1",
    "12",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "a" * 5000,
    "../../etc/passwd",
    "/dev/null",
    [],
    [[]],
    [1, 2, 3],
    ["1", "2", "3", "4"],
    [float("nan")] * 4,
    [10**400] * 4,
    [1e308] * 4,
    [-1e308, 0, 1e308, 1],
    {},
    {"x": 1},
)


def deepen(levels: int) -> list[Any]:
    """A list nested ``levels`` deep."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changes bytes in one to eight places: flips, cuts, copies, inserts and overwrites."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not changed:
            return bytes(changed)
        at, length = rng.randrange(len(changed)), rng.choice((1, 1, 2, 4, 8, 64, 512))
        match rng.randrange(7):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice(_EDGES)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at : at + length] = rng.choice(_WORDS)
            case 5:
                changed[at:at] = rng.randbytes(length)
            case 6:
                del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def list_places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all nodes below the root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*place, key)
        yield from list_places(value, (*place, key))


def get(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def replace(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at ``place``."""
    tree = copy.deepcopy(tree)
    if not place:
        return value
    get(tree, place[:-1])[place[-1]] = value
    return tree


def mutate_tree(rng: random.Random, tree: Any, values: tuple[Any, ...] = ODD_VALUES) -> Any:
    """Replaces, removes, renames, repeats or wraps one to three nodes; returns a changed copy."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(list_places(tree))
        if not places:
            return rng.choice(values)
        place = rng.choice(places)
        parent, key = get(tree, place[:-1]), place[-1]
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                parent[key] = copy.deepcopy(rng.choice(values))
            case 4:
                del parent[key]
            case 5 if isinstance(parent, dict):
                parent[rng.choice(("", "x", f"{key} ", "1"))] = parent.pop(key)
            case 5 | 6:
                parent[key] = [parent[key]]
            case 7:
                parent[key] = copy.deepcopy(get(tree, rng.choice(places[:1] + places)))
    return tree
