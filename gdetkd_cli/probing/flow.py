"""A record as a graph: which values depend on the first convolution, and which of them are maps over the image."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from gdetkd_cli.errors import NO_CONVOLUTION, NoPyramidError
from gdetkd_cli.probing.record import Value

LINEAR = ("mm", "addmm", "bmm", "baddbmm")
_POOLS = ("mean", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")

Size = tuple[int, int]


def find_stem(values: Sequence[Value]) -> int:
    """Returns the index of the first convolution; raises a NoPyramidError if there is none."""
    stem = next((i for i, v in enumerate(values) if v.window and v.op == "convolution" and v.parents), None)
    if stem is None:
        raise NoPyramidError(NO_CONVOLUTION)
    return stem


class Flow:
    """The values that depend on the first convolution. Every attribute below has one entry per value.

    Attributes:
        reached: whether the value depends on the first convolution.
        maps: ((height, width), channels last) if the value is a map over the image, else None.
        children: the values that read it.
        weighted: whether it is a map computed by a convolution or linear layer with weights.
        folded: whether it is a map reshaped into patches or cut along one axis.
    """

    def __init__(self, values: Sequence[Value], stem: int) -> None:
        self.values = values
        self.stem = stem
        frame = values[values[stem].parents[0]].shape[2:]
        reached = [False] * len(values)
        nearest: list[set[Size]] = [set() for _ in values]  # of the last maps on the paths to the value
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
            # A single cell is a map if a sliding window or another single cell produced it, not if averaging did.
            single = values[i].op == "convolution" and window is not None and window.kernel != (1, 1)
            single = single or any(self.size(p) == (1, 1) for p in parents)
            found = _match_map(values[i].shape, (frame[0], frame[1]), single)
            # Patches or slices may later be joined into a map of another size.
            cut = len(values[i].shape) > 4 or (values[i].op == "slice" and not found)
            self.folded[i] = cut and any(self.maps[p] or self.folded[p] for p in parents)
            before = set[Size]().union(*(nearest[p] for p in parents))
            mapped = i == stem or any(self.maps[p] or self.folded[p] for p in parents)
            if found and not mapped and (found[0] not in before or not self._is_rearranged(i)):
                found = None  # tokens or scores shaped like a map
            nearest[i] = {found[0]} if found else before
            self.maps[i] = found
            made_by_weights = values[i].op == "convolution" or values[i].op in LINEAR
            self.weighted[i] = bool(values[i].weights) and made_by_weights and self.maps[i] is not None
        self.reached = reached

    def _is_rearranged(self, i: int) -> bool:
        """Whether a value has the elements of a parent, or some of them, as a map made from its own tokens has."""
        value = self.values[i]
        # A slice cuts off the padding of windows.
        return value.op == "slice" or any(prod(value.shape) == prod(self.values[p].shape) for p in value.parents)

    def size(self, i: int) -> Size | None:
        found = self.maps[i]
        return found[0] if found else None

    def area(self, i: int) -> int:
        size = self.size(i)
        return size[0] * size[1] if size else 0

    def parents(self, i: int) -> list[int]:
        return [p for p in self.values[i].parents if self.reached[p]]


def _match_map(shape: Sequence[int], frame: Size, single: bool) -> tuple[Size, bool] | None:
    """Returns ((height, width), channels last) if the shape covers the frame with one stride, give or take a cell.

    With ``single``, one cell counts as a map.
    """
    if len(shape) != 4 or shape[0] != 1:
        return None
    for height, width, last in ((shape[2], shape[3], False), (shape[1], shape[2], True)):
        if not 1 <= height <= frame[0] or not 1 <= width <= frame[1] or (height * width == 1 and (last or not single)):
            continue
        # The strides that both axes allow.
        low = max(frame[0] / (height + 1), frame[1] / (width + 1))
        high = min(frame[0] / max(height - 1, 0.5), frame[1] / max(width - 1, 0.5))
        if low <= high:
            return (height, width), last
    return None


def is_averaged(flow: Flow, start: int) -> bool:
    """Whether every use of a map averages it over all places, as in a classifier."""
    if flow.size(start) == (1, 1):
        return False
    open_, seen = [start], {start}
    while open_:
        children = flow.children[open_.pop()]
        if not children:
            return False
        for child in children:
            averaged = flow.values[child].op in _POOLS or flow.values[child].shape[-2:] == (1, 1)
            # The statistics that a normalization returns beside its map do not count as a use.
            if child not in seen and flow.values[child].output == 0 and (flow.maps[child] or not averaged):
                seen.add(child)
                open_.append(child)
    return True


def find_dominators(flow: Flow) -> list[int]:
    """Returns, by value, the values (as bits, itself included) on every path from the image to it."""
    sets = [0] * len(flow.values)
    for i in range(flow.stem, len(flow.values)):
        if flow.reached[i]:
            parents = flow.parents(i)
            common = sets[parents[0]] if parents else 0
            for parent in parents[1:]:
                common &= sets[parent]
            sets[i] = common | 1 << i
    return sets
