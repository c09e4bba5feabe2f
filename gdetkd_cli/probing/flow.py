"""What depends on a model's first convolution, and which of it are maps over the image.

A record is a list of values, each with the values that it was made of; here it is walked as the graph that it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from gdetkd_cli.errors import NO_CONVOLUTION, NoPyramidError
from gdetkd_cli.probing.record import Value

LINEAR = ("mm", "addmm", "bmm", "baddbmm")
_POOLS = ("mean", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")

Size = tuple[int, int]


def stem_of(values: Sequence[Value]) -> int:
    stem = next((i for i, v in enumerate(values) if v.window and v.op == "convolution" and v.parents), None)
    if stem is None:
        raise NoPyramidError(NO_CONVOLUTION)
    return stem


class Flow:
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
            if found and (i == stem or any(self.maps[p] or self.folded[p] for p in parents)):
                sizes.add(found[0])
            elif found and found[0] not in sizes:
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


def is_averaged(flow: Flow, start: int) -> bool:
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


def dominators(flow: Flow) -> list[int]:
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
