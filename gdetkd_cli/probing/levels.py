"""Which of a model's values are its feature pyramid: the last full set of maps before the detection heads.

Where one convolution reads maps of several sizes, as the heads of RetinaNet, FCOS or a region proposal network do,
the maps that it reads are the pyramid. Where no such head is and regions are pooled from maps, those are. Where every
level has a head of its own (SSD, YOLO), a head ends in the last convolutions of its size, those that no map with
weights comes after; the level is then the last map that all of these final convolutions depend on. A transformer that
decodes the maps as tokens has no heads of this kind: there the levels are the last maps of each size that tokens are
made of, if heads do not account for all of them.

The reference is the tensor that the first convolution reads: images may be resized, padded and put in a batch before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from gdetkd_cli.errors import NO_CONVOLUTION, NoPyramidError
from gdetkd_cli.probing.record import Value

_POOLS = ("mean", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
LINEAR = ("mm", "addmm", "bmm", "baddbmm")

Size = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """The pyramid among a record's values.

    Attributes:
        levels: indices of the values, fine to coarse.
        sizes: (height, width) cells of each.
        channels_last: for each, whether the map is (N, H, W, C).
        stem: index of the first convolution.
        reference: index of the tensor that it reads.
        reason: why these, for people.
        confidence: how often this reason was right, in 0..1 (see ``_CONFIDENCE``).
        alternatives: other sets of maps that might be meant, and why, by falling likelihood.
    """

    levels: tuple[int, ...]
    sizes: tuple[Size, ...]
    channels_last: tuple[bool, ...]
    stem: int
    reference: int
    reason: str
    confidence: float
    alternatives: tuple[tuple[tuple[int, ...], str], ...] = ()


def find_levels(values: Sequence[Value]) -> Found:
    """The pyramid of a record.

    Raises:
        NoPyramidError: there is none.
    """
    flow = _Flow(values, _stem(values))
    if _says_one_thing(flow):
        raise NoPyramidError("this model says one thing of the whole image, as a classifier does; it detects nothing")
    own_heads = _own_heads(flow)
    rules = (_shared_head(flow), _pooled_regions(flow), _token_exits(flow, own_heads), own_heads)
    sets = [found for found in rules if found.levels]
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
    flow = _Flow(values, _stem(values))
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


# (right + 1) / (tried + 2) of each rule over the detectors in docs/probe.md.
_CONFIDENCE = {"shared head": 0.95, "pooled": 0.5, "own heads": 0.94, "tokens": 0.5, "one level": 0.5}


def _stem(values: Sequence[Value]) -> int:
    stem = next((i for i, v in enumerate(values) if v.window and v.op == "convolution" and v.parents), None)
    if stem is None:
        raise NoPyramidError(NO_CONVOLUTION)
    return stem


def _found(flow: _Flow, best: _Set, others: tuple[tuple[tuple[int, ...], str], ...]) -> Found:
    maps = [found for i in best.levels if (found := flow.maps[i])]
    return Found(
        levels=best.levels,
        sizes=tuple(size for size, _ in maps),
        channels_last=tuple(last for _, last in maps),
        stem=flow.stem,
        reference=flow.values[flow.stem].parents[0],
        reason=best.reason,
        confidence=best.confidence,
        alternatives=others,
    )


class _Flow:
    """What depends on the first convolution, and how.

    Attributes:
        maps: by value, ((height, width), channels last) where it is a map over the image, else None.
        children: by value, the values that read it.
        weighted: by value, whether it is a map made by a convolution or linear layer with weights.
        folded: by value, whether it is a map with its axes cut.
    """

    def __init__(self, values: Sequence[Value], stem: int) -> None:
        self.values = values
        self.stem = stem
        frame = values[values[stem].parents[0]].shape[2:]
        reached = [False] * len(values)
        sizes: set[Size] = set()
        self.children: list[list[int]] = [[] for _ in values]
        self.maps: list[tuple[Size, bool] | None] = [None] * len(values)
        self.weighted = [False] * len(values)
        self.folded = [False] * len(values)
        for i in range(stem, len(values)):
            parents = [p for p in values[i].parents if reached[p]]
            reached[i] = i == stem or bool(parents)
            if not reached[i]:
                continue
            for parent in parents:
                self.children[parent].append(i)
            window = values[i].window
            # One cell is a map where a window came to it, or it was one already; an average over all places is none.
            single = values[i].op == "convolution" and window is not None and window.kernel != (1, 1)
            single = single or any(self.size(p) == (1, 1) for p in parents)
            found = _as_map(values[i].shape, (frame[0], frame[1]), single)
            # A map cut into patches, or along one axis: it may be put together as a map of another size.
            cut = len(values[i].shape) > 4 or (values[i].op == "slice" and not found)
            self.folded[i] = cut and any(self.maps[p] or self.folded[p] for p in parents)
            if found and any(self.maps[p] or self.folded[p] for p in parents):
                sizes.add(found[0])
            elif found and i > stem and found[0] not in sizes:
                found = None  # of tokens or scores: a map only where its size is one that a map has had
            self.maps[i] = found
            made_by_weights = values[i].op == "convolution" or values[i].op in LINEAR
            self.weighted[i] = bool(values[i].weights) and made_by_weights and self.maps[i] is not None
        self.reached = reached

    def size(self, i: int) -> Size | None:
        found = self.maps[i]
        return found[0] if found else None

    def area(self, i: int) -> int:
        size = self.size(i)
        return size[0] * size[1] if size else 0

    def parents(self, i: int) -> list[int]:
        return [p for p in self.values[i].parents if self.reached[p]]


def _as_map(shape: Sequence[int], frame: Size, single: bool) -> tuple[Size, bool] | None:
    """(height, width) of a shape that lies over the frame with one stride, give or take a cell; whether NHWC.

    ``single``: one cell counts as well.
    """
    if len(shape) != 4 or shape[0] != 1:
        return None
    for height, width, last in ((shape[2], shape[3], False), (shape[1], shape[2], True)):
        if not 1 <= height <= frame[0] or not 1 <= width <= frame[1] or (height * width == 1 and (last or not single)):
            continue
        # The interval of strides that each axis allows.
        low = max(frame[0] / (height + 1), frame[1] / (width + 1))
        high = min(frame[0] / max(height - 1, 0.5), frame[1] / max(width - 1, 0.5))
        if low <= high:
            return (height, width), last
    return None


def _says_one_thing(flow: _Flow) -> bool:
    """Whether all that the model gives is a row of numbers for the whole image, as a classifier's scores are."""
    ends = [
        value.shape
        for value, reached, children in zip(flow.values, flow.reached, flow.children, strict=True)
        if reached and not children and value.output == 0
    ]
    return all(shape[:1] == (1,) and prod(shape[:-1]) == 1 for shape in ends)


def _shared_head(flow: _Flow) -> _Set:
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


def _pooled_regions(flow: _Flow) -> _Set:
    """The maps that regions are pooled from, where no head reads them all, as in Sparse R-CNN."""
    poolings = [i for i, value in enumerate(flow.values) if flow.reached[i] and value.op == "roi_align"]
    read = [next((p for p in flow.parents(i) if flow.maps[p]), None) for i in poolings]
    levels = tuple(dict.fromkeys(i for i in read if i is not None))
    return _Set(levels, "the maps that regions are pooled from", _CONFIDENCE["pooled"])


def _own_heads(flow: _Flow) -> _Set:
    """For each size, the last map that all final convolutions of that size depend on."""
    count = len(flow.values)
    weights_below = [False] * count
    for i in range(count - 1, flow.stem - 1, -1):
        weights_below[i] = any(weights_below[child] or flow.weighted[child] for child in flow.children[i])
    last: dict[Size, list[int]] = {}
    for i in range(flow.stem, count):
        size = flow.size(i)
        if size and flow.weighted[i] and not weights_below[i] and not _pooled(flow, i):
            last.setdefault(size, []).append(i)

    needed = _dominators(flow)
    levels = []
    for size, finals in last.items():
        common = needed[finals[0]]
        for i in finals[1:]:
            common &= needed[i]
        for i in finals:
            common &= ~(1 << i)
        candidates = [i for i in range(flow.stem, count) if common >> i & 1 and flow.size(i) == size]
        levels += candidates[-1:]
    reason = "the last map of each size that all of that size's final convolutions depend on"
    return _Set(tuple(levels), reason, _CONFIDENCE["own heads" if len(levels) > 1 else "one level"])


def _token_exits(flow: _Flow, own_heads: _Set) -> _Set:
    """For each size, the last map that is read as tokens by linear layers which no map comes after.

    Nothing where ``own_heads`` account for all of these sizes.
    """
    count = len(flow.values)
    maps_below, linear = [False] * count, [False] * count  # linear: such layers follow, through no map
    for i in range(count - 1, flow.stem, -1):
        children = flow.children[i]
        maps_below[i] = any(maps_below[c] or flow.maps[c] is not None for c in children)
        own = flow.values[i].op in LINEAR and bool(flow.values[i].weights) and not maps_below[i]
        linear[i] = own or any(linear[c] and flow.maps[c] is None for c in children)
    exits = {}
    for i in range(flow.stem + 1, count):
        size = flow.size(i)
        if size and any(linear[c] and flow.maps[c] is None for c in flow.children[i]):
            exits[size] = i
    if exits.keys() <= {flow.size(i) for i in own_heads.levels}:
        return _Set(())
    reason = "the last map of each size that a decoder takes its tokens from"
    return _Set(tuple(exits.values()), reason, _CONFIDENCE["tokens"])


def _body(flow: _Flow, levels: Sequence[int]) -> _Set:
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


def _pooled(flow: _Flow, start: int) -> bool:
    """Whether all that becomes of a map is averaged over all places, as in a classifier."""
    if flow.size(start) == (1, 1):
        return False
    open_, seen = [start], {start}
    while open_:
        children = flow.children[open_.pop()]
        if not children:
            return False
        for child in children:
            averaged = flow.values[child].op in _POOLS or flow.values[child].shape[-2:] == (1, 1)
            # Statistics beside a normalised map are no use that is made of it.
            if child not in seen and flow.values[child].output == 0 and (flow.maps[child] or not averaged):
                seen.add(child)
                open_.append(child)
    return True


def _dominators(flow: _Flow) -> list[int]:
    """By value, the set (as bits) of values that every path from the image to it passes; itself included."""
    sets = [0] * len(flow.values)
    for i in range(flow.stem, len(flow.values)):
        if flow.reached[i]:
            parents = flow.parents(i)
            common = sets[parents[0]] if parents else 0
            for parent in parents[1:]:
                common &= sets[parent]
            sets[i] = common | 1 << i
    return sets
