"""Finds a model's feature pyramid: the last full set of maps before the detection heads.

The rules, in order:

1. Shared head: if one convolution reads maps of several sizes (RetinaNet, FCOS, a region proposal network), these maps
   are the levels.
2. Pooled regions: if regions are pooled from maps (Sparse R-CNN), these maps are the levels.
3. Token decoder: if a transformer decodes maps as tokens, the levels are the last maps of each size that become tokens,
   unless rule 4 covers all of these sizes.
4. Own heads: if every level has its own head (SSD, YOLO), a head ends in the last convolutions of its size. The level
   is the last map that all of them depend on.
5. Token sequence: if the patches stay tokens to the end (YOLOS), the last tokens are the only level.

Rules 1 and 4 are tried first on sequences with one token per cell, after a rule for sequences that are joined. A result
holds if linear layers computed all of these sequences but the finest: a transformer merges patches and never forms
maps, or a head reads slices of an encoder's sequence.

The reference is the first convolution's input; a model may resize, pad and batch images before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from math import prod

from gdetkd_cli.errors import NoPyramidError
from gdetkd_cli.probing.flow import LINEAR, Flow, Size, find_dominators, find_stem, is_averaged
from gdetkd_cli.probing.found import CONFIDENCE, FoundLevels, LevelSet
from gdetkd_cli.probing.record import Value
from gdetkd_cli.probing.sequences import find_joined, find_token_sequence, list_refined, slice_joined

_ACTIVATIONS = ("relu", "silu", "gelu", "leaky_relu", "hardswish", "hardtanh", "elu", "mish", "sigmoid")


def find_levels(values: Sequence[Value]) -> FoundLevels:
    """Finds the pyramid of a record.

    Raises:
        NoPyramidError: there is none.
    """
    flow = Flow(values, find_stem(values))
    if _is_classifier(flow):
        raise NoPyramidError("this model gives one prediction per image, like a classifier; it has no detection head")
    if _is_image_to_image(flow):
        raise NoPyramidError(
            "this model gives images of the input's size or larger, like a denoiser or a super-resolution network; it "
            "has no detection head"
        )
    if sequences := _find_sequences(values, flow.stem):
        return sequences
    own_heads = _find_own_heads(flow)
    rules = (_find_shared_head(flow), _find_pooled_maps(flow), _find_token_exits(flow, own_heads), own_heads)
    sets = [_order_levels(flow, found) for found in rules if found.levels]
    if not sets and (sequence := find_token_sequence(flow)):
        return sequence
    if not sets:
        raise NoPyramidError("no feature map of this model reaches a detection head as a map; name the levels yourself")
    best = sets[0]
    others = {found.levels: found.reason for found in (*sets, _find_body_maps(flow, best.levels)) if found.levels}
    others.pop(best.levels)
    return _describe_levels(flow, best, tuple(others.items()))


def _find_sequences(values: Sequence[Value], stem: int) -> FoundLevels | None:
    """Returns several levels that are computed as sequences of tokens, one token per cell; None if there are none."""
    flow = Flow(values, stem, tokens=True)
    refined = list_refined(flow)
    rules = (find_joined(flow, refined), _find_shared_head(flow), _find_own_heads(flow))
    best = next((_order_levels(flow, found) for found in rules if found.levels), LevelSet())
    if not all(refined[i] for i in best.levels) or len({flow.size(i) for i in best.levels}) < 2:
        return None
    best = replace(best, confidence=CONFIDENCE["sequences"])
    return slice_joined(flow, _describe_levels(flow, best, ()))


def _order_levels(flow: Flow, found: LevelSet) -> LevelSet:
    """Sorts levels fine to coarse; equal sizes stay in the head's order."""
    return replace(found, levels=tuple(sorted(found.levels, key=lambda i: -flow.area(i))))


def choose_levels(values: Sequence[Value], chosen: Sequence[int]) -> FoundLevels:
    """Describes a pyramid chosen by the user, sorted fine to coarse.

    Raises:
        NoPyramidError: there is no convolution, or a chosen value is not a map over the image.
    """
    flow = Flow(values, find_stem(values))
    if not all(map(flow.is_level, chosen)):
        flow = Flow(values, flow.stem, tokens=True)
    invalid = [i for i in chosen if not flow.is_level(i)]
    if invalid:
        shape = " x ".join(map(str, values[invalid[0]].shape))
        raise NoPyramidError(f"a chosen level, of shape {shape}, is not a feature map over the image; choose another")
    levels = tuple(sorted(chosen, key=lambda i: -flow.area(i)))
    return _describe_levels(flow, LevelSet(levels, "chosen by you", 1.0), ())


def _describe_levels(flow: Flow, best: LevelSet, others: tuple[tuple[tuple[int, ...], str], ...]) -> FoundLevels:
    maps = [found for i in best.levels if (found := flow.maps[i])]
    return FoundLevels(
        levels=best.levels,
        sizes=tuple(size for size, _ in maps),
        layouts=tuple(layout for _, layout in maps),
        stem=flow.stem,
        reference=flow.values[flow.stem].parents[0],
        reason=best.reason,
        confidence=best.confidence,
        alternatives=others,
    )


def _is_classifier(flow: Flow) -> bool:
    """Whether the model returns only one row of numbers per image."""
    reached = [
        (value, children) for value, on, children in zip(flow.values, flow.reached, flow.children, strict=True) if on
    ]
    ends = [value.shape for value, children in reached if not children and value.output == 0]
    results = [value.shape for value, _ in reached if value.result]
    # The score of a single box has the shape (1,), which is not a row.
    rows = bool(results) and all(len(shape) > 1 and prod(shape[:-1]) == 1 for shape in results)
    return rows or all(shape[:1] == (1,) and prod(shape[:-1]) == 1 for shape in ends)


def _is_image_to_image(flow: Flow) -> bool:
    """Whether the model returns only images (1, 1..4, H, W) or (1, H, W, 1..4) of its input's size or a multiple."""
    height, width = flow.values[flow.values[flow.stem].parents[0]].shape[2:]
    results = [value.shape for value in flow.values if value.result]

    def is_image(channels: int, rows: int, columns: int) -> bool:
        scale = (rows / height, columns / width)
        # Convolutions without padding trim the image, so its scale may be a little less than a whole number.
        return channels <= 4 and min(scale) >= 0.75 and round(scale[0]) == round(scale[1])

    return bool(results) and all(
        len(shape) == 4 and (is_image(*shape[1:]) or is_image(shape[3], shape[1], shape[2])) for shape in results
    )


def _find_shared_head(flow: Flow) -> LevelSet:
    """Returns the maps read by the first convolution that reads maps of several sizes."""
    uses: dict[str, list[int]] = {}
    for i, weighted in enumerate(flow.weighted):
        if weighted:
            uses.setdefault(flow.values[i].weights[0], []).append(i)
    for weight, calls in uses.items():  # in the order of their first use
        if len({flow.size(i) for i in calls}) > 1:
            levels = [_find_read_map(flow, i) for i in calls]
            reason = f"{weight} reads {len(levels)} maps, so it belongs to a head that all levels share"
            return LevelSet(tuple(levels), reason, CONFIDENCE["shared head"])
    return LevelSet()


def _find_read_map(flow: Flow, i: int) -> int:
    """Returns the map that a layer reads; a linear layer reads a view (T, C) of it."""
    read = next(p for p in flow.parents(i) if flow.maps[p])
    return _find_read_map(flow, read) if len(flow.values[read].shape) == 2 else read


def _find_pooled_maps(flow: Flow) -> LevelSet:
    """Returns the maps that regions are pooled from."""
    poolings = [i for i, value in enumerate(flow.values) if flow.reached[i] and value.op == "roi_align"]
    read = [next((p for p in flow.parents(i) if flow.maps[p]), None) for i in poolings]
    levels = tuple(dict.fromkeys(i for i in read if i is not None))
    return LevelSet(levels, "the maps that regions are pooled from", CONFIDENCE["pooled"])


def _find_own_heads(flow: Flow) -> LevelSet:
    """Returns, for each size, the last map that all final convolutions of that size depend on.

    A convolution that no result depends on is not a head. A projection for a token decoder is a head if there are
    several levels (RT-DETR); if there is one (DETR), the projection is the level. What an activation follows is no
    projection, but the end of a body (LW-DETR).
    """
    count = len(flow.values)
    tokens = _find_token_maps(flow)
    weights_below = [False] * count
    for i in range(count - 1, flow.stem - 1, -1):
        tokens[i] = tokens[i] or any(tokens[child] for child in flow.children[i])
        weights_below[i] = any(weights_below[child] or flow.weighted[child] for child in flow.children[i])
    last: dict[Size, list[int]] = {}
    for i in range(flow.stem, count):
        size = flow.size(i)
        if size and flow.weighted[i] and not weights_below[i] and not is_averaged(flow, i):
            last.setdefault(size, []).append(i)

    needed = find_dominators(flow)
    levels, heads = [], []
    for size, finals in last.items():
        if not any(flow.used[i] for i in finals):
            continue
        common = needed[finals[0]]
        for i in finals[1:]:
            common &= needed[i]
        for i in finals:
            common &= ~(1 << i)
        chain = [i for i in range(flow.stem, count) if common >> i & 1 and flow.is_level(i) and flow.size(i) == size]
        if chain:
            levels.append(chain)
            heads += finals
    if all(tokens[i] for i in heads) and (len(levels) == 1 or any(_is_activated(flow, i) for i in heads)):
        return LevelSet()
    reason = "the last map of each size that all of that size's final convolutions depend on"
    chosen = _step_out_of_head(flow, levels, heads)
    return LevelSet(chosen, reason, CONFIDENCE["own heads" if len(levels) > 1 else "one level"])


def _is_activated(flow: Flow, i: int) -> bool:
    """Whether an activation follows a map, after normalization at most."""
    return any(
        flow.values[child].op.removesuffix("_") in _ACTIVATIONS
        or ("norm" in flow.values[child].op and _is_activated(flow, child))
        for child in flow.children[i]
    )


def _step_out_of_head(flow: Flow, chains: Sequence[Sequence[int]], finals: Sequence[int]) -> tuple[int, ...]:
    """Returns the last map of each chain, or an earlier one if the head's module begins earlier.

    YOLOX's head, for instance, begins with one convolution per level. A level steps back at most to the map from which
    other levels are computed. The coarsest or finest level has no such map and steps back as far as the others.

    Args:
        chains: by level, the maps of its size that its final convolutions depend on.
        finals: the final convolutions of all levels.
    """
    levels = tuple(chain[-1] for chain in chains)
    head = _find_common_module([flow.values[i].module for i in finals])
    if not head or _is_within(flow.values[flow.stem].module, head):
        return levels
    towards = [0] * len(flow.values)  # by value, the levels (as bits) that depend on it
    for i in range(len(flow.values) - 1, flow.stem - 1, -1):
        for child in flow.children[i]:
            towards[i] |= towards[child] | (1 << levels.index(child) if child in levels else 0)
    lengths = []
    for level, chain in enumerate(chains):
        leaves = [at for at, i in enumerate(chain) if towards[i] & ~(1 << level)]
        lengths.append(len(chain) - 1 - leaves[-1] if leaves else None)
    known = {length for length in lengths if length is not None}
    if len(known) != 1 or not (back := known.pop()) or any(len(chain) <= back for chain in chains):
        return levels
    skipped = [chain[-back:] for chain in chains]
    alike = len({tuple(flow.values[i].op for i in part) for part in skipped}) == 1
    inside = all(_is_within(flow.values[i].module, head) for part in skipped for i in part if flow.weighted[i])
    return tuple(chain[-back - 1] for chain in chains) if alike and inside else levels


def _find_common_module(paths: Sequence[str]) -> str:
    """Returns the innermost module that contains all of these, skipping a plain list of one module per level."""
    parts = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    same = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts)]
    if all(path.split(".")[len(same) :][0].isdigit() for path in paths):
        same = same[:-1]
    return ".".join(same)


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _find_token_maps(flow: Flow) -> list[bool]:
    """Returns, by value, whether it is a map whose cells become tokens of final linear layers.

    No map follows these layers, and a result depends on them.
    """
    count = len(flow.values)
    maps_below, linear = [False] * count, [False] * count  # linear: such a layer follows without a map in between
    read = [False] * count
    for i in range(count - 1, flow.stem - 1, -1):
        children = flow.children[i]
        maps_below[i] = any(maps_below[c] or flow.maps[c] is not None for c in children)
        own = flow.values[i].op in LINEAR and bool(flow.values[i].weights) and flow.used[i] and not maps_below[i]
        after = any(linear[c] and flow.maps[c] is None for c in children)
        linear[i] = own or after
        read[i] = after and flow.maps[i] is not None
    return read


def _find_token_exits(flow: Flow, own_heads: LevelSet) -> LevelSet:
    """Returns the last map of each size that a decoder reads as tokens; none if ``own_heads`` covers all sizes."""
    tokens = _find_token_maps(flow)
    exits = {
        size: i
        for i in range(flow.stem + 1, len(flow.values))
        if tokens[i] and flow.is_level(i) and (size := flow.size(i))
    }
    if exits.keys() <= {flow.size(i) for i in own_heads.levels}:
        return LevelSet()
    reason = "the last map of each size that a decoder takes its tokens from"
    return LevelSet(tuple(exits.values()), reason, CONFIDENCE["decoder"])


def _find_body_maps(flow: Flow, levels: Sequence[int]) -> LevelSet:
    """Returns the body's last map of each size of the levels: the last one that depends on no coarser map."""
    least = [0] * len(flow.values)  # area of the smallest map on any path to the value
    last: dict[Size, int] = {}
    for i in range(flow.stem, len(flow.values)):
        if not flow.reached[i]:
            continue
        before = [least[p] for p in flow.parents(i) if least[p]]
        area, size = flow.area(i), flow.size(i)
        least[i] = min([*before, area] if area else before, default=0)
        goes_on = any(0 < flow.area(c) != area for c in flow.children[i])
        if size and area == least[i] and goes_on:
            last[size] = i
    sizes = [flow.size(i) for i in levels]
    return LevelSet(tuple(i for size, i in last.items() if size in sizes), "the body's last map of each size")
