"""A record as a graph: which values depend on the first convolution, and which of them are maps over the image."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

from gdetkd_cli.errors import NO_CONVOLUTION, NoPyramidError
from gdetkd_cli.probing.record import Value

LINEAR = ("mm", "addmm", "bmm", "baddbmm")
_POOLS = ("mean", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")

_CUTS = ("slice", "split", "split_with_sizes")

Size = tuple[int, int]
Layout = Literal["NCHW", "NHWC", "tokens"]  # tokens: (N, T, C); some of the T tokens are the cells, row by row


def find_stem(values: Sequence[Value]) -> int:
    """Returns the index of the first convolution; raises a NoPyramidError if there is none."""
    stem = next((i for i, v in enumerate(values) if v.window and v.op == "convolution" and v.parents), None)
    if stem is None:
        raise NoPyramidError(NO_CONVOLUTION)
    return stem


class Flow:
    """The values that depend on the first convolution. Every attribute below has one entry per value.

    Args:
        stem: index of the first convolution.
        tokens: whether a sequence (1, T, C) or (T, C) is a map if it has one token per cell of the first convolution's
            map, or of this map halved several times.

    Attributes:
        reached: whether the value depends on the first convolution.
        maps: ((height, width), layout) if the value is a map over the image, else None.
        children: the values that read it.
        weighted: whether it is a map computed by a convolution or linear layer with weights.
        used: whether a result depends on it; True for all if no recorded value is a result.
        folded: whether it is a map reshaped into patches or cut along one axis.
    """

    def __init__(self, values: Sequence[Value], stem: int, *, tokens: bool = False) -> None:
        self.values = values
        self.stem = stem
        frame = values[values[stem].parents[0]].shape[2:]
        self.reached = reached = [False] * len(values)
        halved: list[Size] = []  # the first convolution's size, and its halves
        nearest: list[set[Size]] = [set() for _ in values]  # of the last maps on the paths to the value
        self.children: list[list[int]] = [[] for _ in values]
        self.maps: list[tuple[Size, Layout] | None] = [None] * len(values)
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
            before = set[Size]().union(*(nearest[p] for p in parents))
            fitting = _match_map(values[i].shape, (frame[0], frame[1]), single)
            # Both orders of the axes may fit; the size of an earlier map decides, as that of a permuted one.
            found = next((match for match in fitting if match[0] in before), fitting[0] if fitting else None)
            if tokens and not found:
                found = _match_tokens(values[i].shape, [*before, *halved])
            # Patches or slices may later be joined into a map of another size.
            cut = len(values[i].shape) > 4 or (values[i].op == "slice" and not found)
            self.folded[i] = cut and any(self.maps[p] or self.folded[p] for p in parents)
            if found and i != stem and not self._is_map(i, found, before):
                found = None  # tokens or scores shaped like a map
            nearest[i] = {found[0]} if found else before
            self.maps[i] = found
            if i == stem and found:
                halved = _halve(found[0])
            made_by_weights = values[i].op == "convolution" or values[i].op in LINEAR
            self.weighted[i] = bool(values[i].weights) and made_by_weights and self.maps[i] is not None
        self.used = self._find_used()

    def _find_used(self) -> list[bool]:
        used = [False] * len(self.values)
        for i in range(len(self.values) - 1, self.stem - 1, -1):
            used[i] = self.values[i].result or any(used[child] for child in self.children[i])
        return used if any(used) else [True] * len(self.values)

    def _is_map(self, i: int, found: tuple[Size, Layout], before: set[Size]) -> bool:
        """Whether a value shaped like a map is computed from maps, or made from the tokens of an earlier map.

        ``before`` has the sizes of the last maps on the paths to the value.
        """
        size, layout = found
        value, parents = self.values[i], self.parents(i)
        if any(self.folded[p] or (self.maps[p] and (layout != "tokens" or self.size(p) == size)) for p in parents):
            return True
        # A map made from tokens has all elements of a parent. A slice drops the padding of windows, or other levels.
        whole = any(prod(value.shape) == prod(self.values[p].shape) for p in parents)
        if layout == "tokens":
            return (before == {size} and whole) or (size in before and value.op in _CUTS)
        return size in before and (value.op == "slice" or whole)

    def size(self, i: int) -> Size | None:
        found = self.maps[i]
        return found[0] if found else None

    def is_level(self, i: int) -> bool:
        """Whether a value can be a level: a map, but no view (T, C) of its tokens."""
        return self.maps[i] is not None and len(self.values[i].shape) > 2

    def area(self, i: int) -> int:
        size = self.size(i)
        return size[0] * size[1] if size else 0

    def parents(self, i: int) -> list[int]:
        return [p for p in self.values[i].parents if self.reached[p]]


def _match_map(shape: Sequence[int], frame: Size, single: bool) -> list[tuple[Size, Layout]]:
    """Lists each ((height, width), layout) with which the shape covers the frame with one stride, give or take a cell.

    With ``single``, one cell counts as a map.
    """
    if len(shape) != 4 or shape[0] != 1:
        return []
    found: list[tuple[Size, Layout]] = []
    for height, width, last in ((shape[2], shape[3], False), (shape[1], shape[2], True)):
        if not 1 <= height <= frame[0] or not 1 <= width <= frame[1] or (height * width == 1 and (last or not single)):
            continue
        # The strides that both axes allow.
        low = max(frame[0] / (height + 1), frame[1] / (width + 1))
        high = min(frame[0] / max(height - 1, 0.5), frame[1] / max(width - 1, 0.5))
        if low <= high:
            found.append(((height, width), "NHWC" if last else "NCHW"))
    return found


def _match_tokens(shape: Sequence[int], sizes: Sequence[Size]) -> tuple[Size, Layout] | None:
    """Returns ((height, width), "tokens") if (1, T, C) or (T, C) has one token per cell of one of these sizes."""
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)) or shape[-2] == 1:
        return None
    size = next((size for size in sizes if size[0] * size[1] == shape[-2]), None)
    return None if size is None else (size, "tokens")


def _halve(size: Size) -> list[Size]:
    """Lists a size and its halves, as long as they are whole numbers."""
    sizes = [size]
    while not size[0] % 2 and not size[1] % 2:
        size = (size[0] // 2, size[1] // 2)
        sizes.append(size)
    return sizes


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
