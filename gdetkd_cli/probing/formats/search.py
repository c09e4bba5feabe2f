"""Finds how a model takes images that failed on the usual ones: its size, type, channels, layout or batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gdetkd_cli.probing.inputs import Call, take_channels_last

Size = tuple[int, int]  # (height, width) in pixels

_ORDINARY = (480, 640)  # to which no model is likely to be bound
# Sides of the squares with which models are traced, the most frequent first.
_USUAL_SIDES = (640, 416, 320, 512, 300, 800, 608, 224, 256, 1024, 384, 448, 550, 600, 768, 896, 960, 1280, 128, 96, 64)
_USUAL_SIZES = (*((side, side) for side in _USUAL_SIDES), (384, 640), (512, 1024), (736, 1280), (800, 1344))
_LARGEST_BATCH = 64


def find_size(accepts: Callable[[Size], bool], declared: Sequence[Size] = ()) -> Size | None:
    """Finds the size of a model that fails on an ordinary image and works on one of a usual size.

    Most tools trace a model with one image, and its size becomes a constant of the file. None if the ordinary image
    works, or if no usual size does.

    Args:
        accepts: whether the model works on an image of a size.
    """
    if accepts(_ORDINARY):
        return None
    return next(filter(accepts, (*declared, *_USUAL_SIZES)), None)


def find_way(
    accepts: Callable[[Call, int, Size], bool], calls: Sequence[Call], batches: Sequence[int], declared: Size | None
) -> tuple[Call, int, Size | None] | None:
    """Finds a way of calling a TorchScript module that fails on usual images.

    Args:
        accepts: whether the module works on an image of so many channels and of a size.
        calls: the usual ways of calling it.
        batches: numbers of images that it may be bound to.
        declared: its size, if its file states one.

    Returns:
        The call, the channels (3, or 1 for grey), and the size if the module takes no other; None if no way works.
    """
    ways = list(_vary(calls, batches))
    sizes = (_ORDINARY, *_USUAL_SIZES) if declared is None else (declared,)
    for size, (call, channels) in product(sizes, ways):
        if accepts(call, channels, size):
            return call, channels, declared if size == _ORDINARY else size
    return None


def _vary(calls: Sequence[Call], batches: Sequence[int]) -> Iterator[tuple[Call, int]]:
    """Yields ways of calling a module, each with the number of channels, the most frequent first."""
    yield from ((call, 3) for call in calls)
    lasts = [take_channels_last(call) for call in calls if "3, H, W" in call.name]
    yield from ((call, 3) for call in lasts)
    yield from ((replace(call, dtype=torch.uint8), 3) for call in (*lasts, *calls))
    yield from ((replace(call, name=call.name.replace("3, H, W", "1, H, W")), 1) for call in calls)
    for batch, call in product(batches, calls):
        if call.takes == "one size":
            yield replace(call, name=call.name.replace("(N,", f"({batch},"), batch=batch), 3


def list_batches(module: torch.jit.ScriptModule) -> list[int]:
    """Numbers that begin the shapes in a traced graph; the number of images that it was traced with is one of them."""
    graph: Any = module.inlined_graph  # torch's stub lacks its methods
    lists = graph.findAllNodes("prim::ListConstruct", recurse=True)
    rows = [[value.toIValue() for value in node.inputs()] for node in lists]
    # Freezing computes tensors of such a shape once; those of four axes are weights.
    rows += [list(tensor.shape) for tensor in _list_constants(module) if tensor.dim() == 3]
    first = [row[0] for row in rows if len(row) > 2 and isinstance(row[0], int)]
    return sorted({number for number in first if 1 < number <= _LARGEST_BATCH})


def find_weight_type(module: torch.jit.ScriptModule) -> torch.dtype:
    """Returns the type of the first convolution's weight; float32 if there is none."""
    tensors = list(module.state_dict().values()) or _list_constants(module)
    kernels = [tensor for tensor in tensors if tensor.dim() == 4 and tensor.is_floating_point()]
    return kernels[0].dtype if kernels else torch.float32


def _list_constants(module: torch.jit.ScriptModule) -> list[Tensor]:
    """The tensors that a frozen graph holds, among them its weights."""
    graph: Any = module.inlined_graph
    values = [node.output().toIValue() for node in graph.findAllNodes("prim::Constant", recurse=True)]
    return [value for value in values if isinstance(value, Tensor)]
