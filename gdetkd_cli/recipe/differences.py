"""Compares two recipes field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def find_changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By dotted name, such as ``train.optimizer.lr``, both values of each field that differs; sorted by name.

    Args:
        before, now: two recipes as ``model_dump(mode="json")`` gives them; a missing field counts as None.
    """
    old, new = dict(_flatten(before)), dict(_flatten(now))
    return {name: (old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)}


def _flatten(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
