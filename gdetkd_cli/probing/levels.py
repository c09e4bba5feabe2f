"""Which of a model's values are its feature pyramid: the last full set of maps before the detection heads.

Where one convolution reads maps of several sizes, as the heads of RetinaNet, FCOS or a region proposal network do,
the maps that it reads are the pyramid. Where no such head is and regions are pooled from maps, those are. Where every
level has a head of its own (SSD, YOLO), a head ends in the last convolutions of its size, those that no map with
weights comes after; the level is then the last map that all of these final convolutions depend on. A transformer that
decodes the maps as tokens has no heads of this kind: there the levels are the last maps of each size that tokens are
made of, if heads do not account for all of them. Where patches are tokens from the start and to the end, the last
tokens are the one level.

The reference is the tensor that the first convolution reads: images may be resized, padded and put in a batch before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from typing import Literal

from gdetkd_cli.errors import NoPyramidError
from gdetkd_cli.probing.flow import LINEAR, Flow, Size, dominators, is_averaged, stem_of
from gdetkd_cli.probing.record import Value

Layout = Literal["NCHW", "NHWC", "tokens"]  # tokens: (N, T, C), some of the T being the cells, row by row


@dataclass(frozen=True)
class Found:
    """The pyramid among a record's values.

    Attributes:
        levels: indices of the values, fine to coarse.
        sizes: (height, width) cells of each.
        layouts: for each, how its axes lie.
        stem: index of the first convolution.
        reference: index of the tensor that it reads.
        reason: why these, for people.
        confidence: how often this reason was right, in 0..1 (see ``_CONFIDENCE``).
        alternatives: other sets of maps that might be meant, and why, by falling likelihood.
        embedded: where the level is a sequence of tokens, the index of the first value that is this sequence.
    """

    levels: tuple[int, ...]
    sizes: tuple[Size, ...]
    layouts: tuple[Layout, ...]
    stem: int
    reference: int
    reason: str
    confidence: float
    alternatives: tuple[tuple[tuple[int, ...], str], ...] = ()
    embedded: int | None = None


def find_levels(values: Sequence[Value]) -> Found:
    """The pyramid of a record.

    Raises:
        NoPyramidError: there is none.
    """
    flow = Flow(values, stem_of(values))
    if _says_one_thing(flow):
        raise NoPyramidError("this model says one thing of the whole image, as a classifier does; it detects nothing")
    own_heads = _own_heads(flow)
    rules = (_shared_head(flow), _pooled_regions(flow), _token_exits(flow, own_heads), own_heads)
    sets = [found for found in rules if found.levels]
    if not sets and (sequence := _token_sequence(flow)):
        return sequence
    if not sets:
        raise NoPyramidError("no feature map of this model reaches a detection head with its places intact")
    ordered = [replace(found, levels=tuple(sorted(found.levels, key=lambda i: -flow.area(i)))) for found in sets]
    best = ordered[0]  # equal sizes stay in the head's order
    others = {found.levels: found.reason for found in (*ordered, _body(flow, best.levels)) if found.levels}
    others.pop(best.levels)
    return _found(flow, best, tuple(others.items()))


def choose_levels(values: Sequence[Value], chosen: Sequence[int]) -> Found:
    """The pyramid that someone chose, in the order of its sizes.

    Raises:
        NoPyramidError: there is no convolution, or a choice is no map over the image.
    """
    flow = Flow(values, stem_of(values))
    strange = [i for i in chosen if flow.maps[i] is None]
    if strange:
        shape = " x ".join(map(str, values[strange[0]].shape))
        raise NoPyramidError(f"a chosen level, of shape {shape}, is no feature map over the image")
    levels = tuple(sorted(chosen, key=lambda i: -flow.area(i)))
    return _found(flow, _Set(levels, "chosen by you", 1.0), ())


@dataclass(frozen=True)
class _Set:
    """Levels that a rule found, why, and how often that rule is right."""

    levels: tuple[int, ...]
    reason: str = ""
    confidence: float = 0.0


# (right + 1) / (tried + 2) of each rule over the detectors in docs/reference/probed-models.md.
_CONFIDENCE = {
    "shared head": 0.95,
    "pooled": 0.5,
    "own heads": 0.95,
    "decoder": 0.86,
    "one level": 0.75,
    "tokens": 0.67,
}


def _found(flow: Flow, best: _Set, others: tuple[tuple[tuple[int, ...], str], ...]) -> Found:
    maps = [found for i in best.levels if (found := flow.maps[i])]
    return Found(
        levels=best.levels,
        sizes=tuple(size for size, _ in maps),
        layouts=tuple("NHWC" if last else "NCHW" for _, last in maps),
        stem=flow.stem,
        reference=flow.values[flow.stem].parents[0],
        reason=best.reason,
        confidence=best.confidence,
        alternatives=others,
    )


def _says_one_thing(flow: Flow) -> bool:
    """Whether all that the model gives is a row of numbers for the whole image, as a classifier's scores are."""
    reached = [
        (value, children) for value, on, children in zip(flow.values, flow.reached, flow.children, strict=True) if on
    ]
    ends = [value.shape for value, children in reached if not children and value.output == 0]
    results = [value.shape for value, _ in reached if value.result]
    # Beside one box there is its score, of shape (1,): no row.
    rows = bool(results) and all(len(shape) > 1 and prod(shape[:-1]) == 1 for shape in results)
    return rows or all(shape[:1] == (1,) and prod(shape[:-1]) == 1 for shape in ends)


def _shared_head(flow: Flow) -> _Set:
    """The maps of several sizes that one convolution reads, the earliest such convolution of the model."""
    uses: dict[str, list[int]] = {}
    for i, weighted in enumerate(flow.weighted):
        if weighted:
            uses.setdefault(flow.values[i].weights[0], []).append(i)
    for weight, made in uses.items():  # in the order of their first use
        if len({flow.size(i) for i in made}) > 1:
            levels = [next(p for p in flow.parents(i) if flow.maps[p]) for i in made]
            reason = f"{weight} reads {len(levels)} maps, so it is a head's and they are the levels"
            return _Set(tuple(levels), reason, _CONFIDENCE["shared head"])
    return _Set(())


def _pooled_regions(flow: Flow) -> _Set:
    """The maps that regions are pooled from, where no head reads them all, as in Sparse R-CNN."""
    poolings = [i for i, value in enumerate(flow.values) if flow.reached[i] and value.op == "roi_align"]
    read = [next((p for p in flow.parents(i) if flow.maps[p]), None) for i in poolings]
    levels = tuple(dict.fromkeys(i for i in read if i is not None))
    return _Set(levels, "the maps that regions are pooled from", _CONFIDENCE["pooled"])


def _own_heads(flow: Flow) -> _Set:
    """For each size, the last map that all final convolutions of that size depend on.

    Convolutions that nothing of the result comes from are no heads. Those that project maps for a decoder of tokens
    count as heads where there are several levels, as RT-DETR's decoder has them; where there is one, as in DETR, its
    projection is the level.
    """
    count = len(flow.values)
    tokens = _read_as_tokens(flow)
    weights_below, used = [False] * count, [False] * count
    for i in range(count - 1, flow.stem - 1, -1):
        tokens[i] = tokens[i] or any(tokens[child] for child in flow.children[i])
        weights_below[i] = any(weights_below[child] or flow.weighted[child] for child in flow.children[i])
        used[i] = flow.values[i].result or any(used[child] for child in flow.children[i])
    known = any(used)  # a result may be something else than tensors
    last: dict[Size, list[int]] = {}
    for i in range(flow.stem, count):
        size = flow.size(i)
        if size and flow.weighted[i] and not weights_below[i] and not is_averaged(flow, i):
            last.setdefault(size, []).append(i)

    needed = dominators(flow)
    levels, heads = [], []
    for size, finals in last.items():
        if known and not any(used[i] for i in finals):
            continue
        common = needed[finals[0]]
        for i in finals[1:]:
            common &= needed[i]
        for i in finals:
            common &= ~(1 << i)
        chain = [i for i in range(flow.stem, count) if common >> i & 1 and flow.size(i) == size]
        if chain:
            levels.append(chain)
            heads += finals
    if len(levels) == 1 and all(tokens[i] for i in heads):
        return _Set(())
    reason = "the last map of each size that all of that size's final convolutions depend on"
    chosen = _given_to_head(flow, levels, heads)
    return _Set(chosen, reason, _CONFIDENCE["own heads" if len(levels) > 1 else "one level"])


def _given_to_head(flow: Flow, chains: Sequence[Sequence[int]], finals: Sequence[int]) -> tuple[int, ...]:
    """The last map of each chain; before it, where the module that holds all final convolutions begins before it.

    As in YOLOX, whose head has a convolution of its own for each level first. A level goes back no further than to
    where other levels come from it. The coarsest or the finest has no such place: it goes back as far as the others.

    Args:
        flow: the record.
        chains: by level, the maps of its size that its final convolutions depend on.
        finals: all levels' final convolutions.
    """
    levels = tuple(chain[-1] for chain in chains)
    head = _common_module([flow.values[i].module for i in finals])
    if not head or _within(flow.values[flow.stem].module, head):
        return levels
    towards = [0] * len(flow.values)  # the levels, as bits, that come of a value
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
    inside = all(_within(flow.values[i].module, head) for part in skipped for i in part if flow.weighted[i])
    return tuple(chain[-back - 1] for chain in chains) if alike and inside else levels


def _common_module(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these; not a mere list of them, by level."""
    parts = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    same = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts)]
    if all(path.split(".")[len(same) :][0].isdigit() for path in paths):
        same = same[:-1]
    return ".".join(same)


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _read_as_tokens(flow: Flow) -> list[bool]:
    """By value, whether it is a map whose cells become tokens of linear layers which no map comes after."""
    count = len(flow.values)
    maps_below, linear = [False] * count, [False] * count  # linear: such layers follow, through no map
    read = [False] * count
    for i in range(count - 1, flow.stem - 1, -1):
        children = flow.children[i]
        maps_below[i] = any(maps_below[c] or flow.maps[c] is not None for c in children)
        own = flow.values[i].op in LINEAR and bool(flow.values[i].weights) and not maps_below[i]
        after = any(linear[c] and flow.maps[c] is None for c in children)
        linear[i] = own or after
        read[i] = after and flow.maps[i] is not None
    return read


def _token_exits(flow: Flow, own_heads: _Set) -> _Set:
    """For each size, the last map that is read as tokens by linear layers which no map comes after.

    Nothing where ``own_heads`` account for all of these sizes.
    """
    tokens = _read_as_tokens(flow)
    exits = {size: i for i in range(flow.stem + 1, len(flow.values)) if tokens[i] and (size := flow.size(i))}
    if exits.keys() <= {flow.size(i) for i in own_heads.levels}:
        return _Set(())
    reason = "the last map of each size that a decoder takes its tokens from"
    return _Set(tuple(exits.values()), reason, _CONFIDENCE["decoder"])


def _token_sequence(flow: Flow) -> Found | None:
    """The last tokens of a detector that has tokens alone, one for each patch and some more, as YOLOS has them.

    It must give boxes, and the patches must have been made by the first convolution.
    """
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
    return Found(
        levels=(last,),
        sizes=(size,),
        layouts=("tokens",),
        stem=flow.stem,
        reference=flow.values[flow.stem].parents[0],
        reason="the last of the tokens, one for each patch of the image, that all else is made of",
        confidence=_CONFIDENCE["tokens"],
        embedded=next(i for i in sequences if flow.values[i].shape == flow.values[last].shape),
    )


def _body(flow: Flow, levels: Sequence[int]) -> _Set:
    """For each size of the levels, the last map on the way down: what was made before any coarser map came back."""
    least = [0] * len(flow.values)  # the smallest map so far on any path to a value
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
    wanted = [flow.size(i) for i in levels]
    return _Set(tuple(i for size, i in last.items() if size in wanted), "the body's last map of each size")
