"""Levels in sequences of tokens (N, T, C): a single level among other tokens, or slices of a joined sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gdetkd_cli.probing.flow import LINEAR, Flow, find_dominators
from gdetkd_cli.probing.found import CONFIDENCE, FoundLevels, LevelSet


def find_token_sequence(flow: Flow) -> FoundLevels | None:
    """Returns the last tokens of a model that returns boxes and computes patches in its first convolution (YOLOS)."""
    size = flow.size(flow.stem)
    boxes = any(value.result and value.shape[-1:] == (4,) and len(value.shape) > 1 for value in flow.values)
    if not size or not boxes:
        return None
    patches, channels = size[0] * size[1], flow.values[flow.stem].shape[1]
    sequences = [
        i
        for i, value in enumerate(flow.values)
        if flow.reached[i] and len(value.shape) == 3 and value.shape[::2] == (1, channels) and value.shape[1] >= patches
    ]
    if not sequences:
        return None
    last = sequences[-1]
    return FoundLevels(
        levels=(last,),
        sizes=(size,),
        layouts=("tokens",),
        stem=flow.stem,
        reference=flow.values[flow.stem].parents[0],
        reason="the last sequence of tokens with one token per patch of the image",
        confidence=CONFIDENCE["tokens"],
        embedded=next(i for i in sequences if flow.values[i].shape == flow.values[last].shape),
    )


def list_refined(flow: Flow) -> list[bool]:
    """Lists the maps, by value, that are sequences after a linear layer, or have the first convolution's size."""
    refined = [False] * len(flow.values)  # whether a linear layer follows the last map that is no sequence
    for i in range(flow.stem, len(flow.values)):
        found = flow.maps[i]
        if not found or found[1] == "tokens":
            refined[i] = _is_linear(flow, i) or any(refined[p] for p in flow.parents(i))
    return [flow.is_level(i) and (refined[i] or flow.size(i) == flow.size(flow.stem)) for i in range(len(flow.values))]


def find_joined(flow: Flow, refined: Sequence[bool]) -> LevelSet:
    """Returns the refined sequences of several sizes that one operator joins before further linear layers."""
    below = _list_below(flow)
    for i in range(flow.stem, len(flow.values)):
        parents = tuple(flow.parents(i))
        if below[i] and len({flow.size(p) for p in parents}) > 1 and all(refined[p] for p in parents):
            rows = sum(flow.values[p].shape[-2] for p in parents)
            if flow.values[i].shape == (1, rows, flow.values[parents[0]].shape[-1]):
                reason = "the sequences, one token per cell, that are joined before the last linear layers"
                return LevelSet(parents, reason, CONFIDENCE["sequences"])
    return LevelSet()


def slice_joined(flow: Flow, found: FoundLevels) -> FoundLevels:
    """Returns the levels as slices of the last joined sequence that all final linear layers depend on, if there is one.

    The levels' sequences are joined by one operator, and later layers refine the joined sequence.
    """
    count = len(flow.values)
    joined = next((i for i in range(flow.stem, count) if set(flow.parents(i)) == set(found.levels)), count)
    below, needed = _list_below(flow), find_dominators(flow)
    common = ~0
    for i in range(joined, count):
        if _is_linear(flow, i) and not below[i]:
            common &= needed[i] & ~(1 << i)
    same = [i for i in range(joined, count) if flow.values[i].shape == flow.values[joined].shape and common >> i & 1]
    if not same or same[-1] == joined:
        return found
    order = tuple(flow.parents(joined).index(i) for i in found.levels)
    return replace(found, levels=(same[-1],) * len(order), order=order)


def _is_linear(flow: Flow, i: int) -> bool:
    return flow.reached[i] and flow.values[i].op in LINEAR and bool(flow.values[i].weights)


def _list_below(flow: Flow) -> list[bool]:
    """Lists, by value, whether a linear layer depends on it."""
    below = [False] * len(flow.values)
    for i in range(len(flow.values) - 1, flow.stem - 1, -1):
        below[i] = any(below[child] or _is_linear(flow, child) for child in flow.children[i])
    return below
