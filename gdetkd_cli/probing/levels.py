"""Which of a model's values are its feature pyramid: the last full set of maps before the detection heads.

Two things give heads away. Where one convolution reads maps of several sizes, as the heads of RetinaNet, FCOS or a
region proposal network do, the maps that it reads are the pyramid. Where every level has a head of its own (SSD, YOLO),
a head ends in the last convolutions of its size, those that no map with weights comes after. The level is then the last
map that all of these final convolutions depend on. A transformer that decodes the maps as tokens has no such
heads: there the levels are the last maps of each size that tokens are made of, if heads do not account for all of them.

The reference is the tensor that the first convolution reads: images may be resized, padded and put in a batch before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gdetkd_cli.errors import NoPyramidError
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
    """

    levels: tuple[int, ...]
    sizes: tuple[Size, ...]
    channels_last: tuple[bool, ...]
    stem: int
    reference: int
    reason: str


def find_levels(values: Sequence[Value]) -> Found:
    """The pyramid of a record.

    Raises:
        NoPyramidError: there is none.
    """
    stem = next((i for i, v in enumerate(values) if v.window and v.op == "convolution" and v.parents), None)
    if stem is None:
        raise NoPyramidError("no convolution reads an image in this model, so it has no feature maps")
    flow = _Flow(values, stem)
    if _says_one_thing(flow):
        raise NoPyramidError("this model says one thing of the whole image, as a classifier does; it detects nothing")
    levels, reason = _shared_head(flow) or _own_heads(flow)
    if not levels:
        raise NoPyramidError("no feature map of this model reaches a detection head with its places intact")
    levels = sorted(levels, key=lambda i: -flow.area(i))  # equal ones stay in the head's order
    maps = [found for i in levels if (found := flow.maps[i])]
    return Found(
        levels=tuple(levels),
        sizes=tuple(size for size, _ in maps),
        channels_last=tuple(last for _, last in maps),
        stem=stem,
        reference=values[stem].parents[0],
        reason=reason,
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


def _shared_head(flow: _Flow) -> tuple[list[int], str] | None:
    """The maps of several sizes that one convolution reads, the earliest such convolution of the model."""
    uses: dict[str, list[int]] = {}
    for i, weighted in enumerate(flow.weighted):
        if weighted:
            uses.setdefault(flow.values[i].weights[0], []).append(i)
    for weight, made in uses.items():  # in the order of their first use
        if len({flow.size(i) for i in made}) > 1:
            levels = [next(p for p in flow.parents(i) if flow.maps[p]) for i in made]
            return levels, f"{weight} reads {len(levels)} maps, so it is a head's and they are the levels"
    return None


def _own_heads(flow: _Flow) -> tuple[list[int], str]:
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
    exits = _token_exits(flow)
    if not exits.keys() <= {flow.size(i) for i in levels}:
        return list(exits.values()), "the last map of each size that a decoder takes its tokens from"
    return levels, "the last map of each size that all of that size's final convolutions depend on"


def _token_exits(flow: _Flow) -> dict[Size, int]:
    """By size, the last map that is read as tokens by linear layers which no map comes after."""
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
    return exits


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
