"""A model's pyramid, found by running it: no module path, no knowledge of its code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gdetkd_cli.errors import ModelError, NoPyramidError
from gdetkd_cli.probing.flow import LINEAR
from gdetkd_cli.probing.formats.runner import Runner
from gdetkd_cli.probing.geometry import Geometry, cells_of, evenly, measure_frame, through
from gdetkd_cli.probing.inputs import Call, ModelInput
from gdetkd_cli.probing.levels import Found, Layout, choose_levels, find_levels
from gdetkd_cli.probing.outputs import OutputForm, recognise_form
from gdetkd_cli.probing.record import Address, Output, Value


@dataclass(frozen=True)
class ProbedLevel:
    """A level.

    Attributes:
        name: for people.
        address: where it is read in a forward.
        layout: how its axes lie.
        channels: C.
        shape: (height, width) cells.
        cells: where they lie, in pixels of the network's input.
        geometry: the same in pixels of the image.
        output: the submodule's output that it is, where there is one.
        first_token: of a level of tokens, which of them is the first cell.
    """

    name: str
    address: Address
    layout: Layout
    channels: int
    shape: tuple[int, int]
    cells: Geometry
    geometry: Geometry
    output: Output | None
    first_token: int = 0

    def as_map(self, value: Tensor, network_size: Sequence[int]) -> Tensor:
        """The level (N, C, H, W) of a value, and of the (height, width) pixels of the network's input."""
        if self.layout == "NHWC":
            return value.movedim(-1, 1)
        if self.layout == "NCHW":
            return value
        height, width = (int(n / stride + 1e-6) for n, stride in zip(network_size, self.cells.stride, strict=True))
        cells = value[:, self.first_token : self.first_token + height * width]
        return cells.transpose(1, 2).unflatten(2, (height, width))


@dataclass(frozen=True)
class Probed:
    """What probing found.

    Attributes:
        call: how the model is called.
        family: two-stage where regions of the maps are pooled; else unknown.
        levels: fine to coarse.
        region_embedding: name and channels of what a region head's predictors read.
        least_side: of a region on its level, in cells, where the regions that were pooled tell: one of twice that side
            belongs to the next level.
        reason: why these are the levels, for people.
        detections: how what the model returns is read; None where its form is not known.
        confidence: how often this reason was right, in 0..1.
        alternatives: names of other sets of maps that might be meant, and why.
        first: the submodule of the first convolution, as far as its weights tell.
    """

    call: Call
    family: Literal["two-stage", "unknown"]
    levels: tuple[ProbedLevel, ...]
    region_embedding: tuple[str, int] | None
    least_side: float | None
    detections: OutputForm | None
    reason: str
    confidence: float
    alternatives: tuple[tuple[tuple[str, ...], str], ...]
    first: str


def probe(
    runner: Runner,
    size: tuple[int, int],
    model_input: ModelInput,
    chosen: Sequence[str] = (),
    classes: int | None = None,
) -> Probed:
    """Finds the pyramid of a model.

    Args:
        runner: the model, on the CPU.
        size: (height, width) pixels of the image that it is run on.
        model_input: what it wants of its images.
        chosen: names of the levels, where someone knows better; empty: they are found.
        classes: how many it detects, where that is known.

    Raises:
        ModelError: it cannot be called in any known way, or has no value of a chosen name.
        NoPyramidError: it has no feature pyramid.
    """
    image = probe_image(size)
    with warnings.catch_warnings(action="ignore"):  # the model's own
        given = model_input.prepare(image)
        recorded = runner.record(given)
        call, values = recorded.call, recorded.values
        found = choose_levels(values, _indices(values, chosen)) if chosen else find_levels(values)
        frame = frame_of(runner, call, image, model_input)
    levels = []
    first_token = _first_token(runner, call, model_input.prepare(image), values, found)
    for index, shape, layout in zip(found.levels, found.sizes, found.layouts, strict=True):
        value = values[index]
        at = found.stem if layout == "tokens" else index
        cells = None if layout == "NHWC" else cells_of(values, found.reference, at)
        cells = cells or evenly(values[found.reference].shape[-2:], shape)
        levels.append(
            ProbedLevel(
                name=name_of(value),
                address=Address(value.op, value.call, value.output),
                layout=layout,
                channels=value.shape[1 if layout == "NCHW" else -1],
                shape=shape,
                cells=cells,
                geometry=through(frame, cells),
                output=value.returned,
                first_token=first_token,
            )
        )
    pooled = next((i for i, v in enumerate(values) if v.op == "roi_align"), None)
    return Probed(
        call=call,
        family="unknown" if pooled is None else "two-stage",
        levels=tuple(levels),
        region_embedding=None if pooled is None else _region_embedding(values, pooled),
        least_side=None if pooled is None else _least_side(values, pooled, found.levels),
        detections=recognise_form(recorded.returned, (given.shape[-2], given.shape[-1]), classes),
        reason=found.reason,
        confidence=found.confidence,
        alternatives=tuple((tuple(name_of(values[i]) for i in levels), why) for levels, why in found.alternatives),
        first=values[found.stem].module,
    )


def probe_image(size: tuple[int, int]) -> Tensor:
    """(3, H, W) in 0..1: smooth blotches under fine noise, the same every time."""
    generator = torch.Generator().manual_seed(0)
    coarse = interpolate(torch.rand(1, 3, 12, 16, generator=generator), size=size, mode="bilinear")[0]
    return 0.8 * coarse + 0.2 * torch.rand(3, *size, generator=generator)


def frame_of(runner: Runner, call: Call, image: Tensor, model_input: ModelInput) -> Geometry:
    """Where the pixels of the network's input lie in the pixels of an image (3, H, W) in 0..1."""
    return measure_frame(lambda changed: runner.read(call, [model_input.prepare(changed)], ())[0], image)


def name_of(value: Value) -> str:
    """Its own name; else the submodule's output that it is; else what made it, as far as weights tell, or its call."""
    if value.name:
        return value.name
    if value.returned:
        return value.returned.name
    return (not value.output and value.module) or _call_of(value)


def _call_of(value: Value) -> str:
    """``convolution:3``; ``split:3.1`` for the second of an operator's outputs."""
    return f"{value.op}:{value.call}{f'.{value.output}' if value.output else ''}"


def _indices(values: Sequence[Value], names: Sequence[str]) -> list[int]:
    """The values of these names.

    Raises:
        ModelError: there is none of a name, or several.
    """
    known: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        own = {value.name, value.returned.name if value.returned else ""}
        # What else an operator gives, its statistics for instance, is not what its module is named for.
        module = "" if value.output else value.module
        for name in (own | {_call_of(value), module}) - {""}:
            known.setdefault(name, []).append(i)
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ModelError(f"the model computes nothing named {name!r}{hint}")
        if len(known[name]) > 1:
            calls = ", ".join(_call_of(values[i]) for i in known[name])
            raise ModelError(f"{len(known[name])} values are named {name!r}; name one of them by its call: {calls}")
    return [known[name][0] for name in names]


def _first_token(runner: Runner, call: Call, image: Tensor, values: Sequence[Value], found: Found) -> int:
    """Which of a level's tokens is the first patch: where the tokens change as the patches do, if the image changes.

    Raises:
        NoPyramidError: nowhere; the patches lie in another order.
    """
    if found.embedded is None:
        return 0
    addresses = [Address(values[i].op, values[i].call, values[i].output) for i in (found.stem, found.embedded)]
    before, after = (runner.read(call, [shown], addresses)[1] for shown in (image, image.flip(-1)))
    patches, tokens = ((b - a)[0].double() for a, b in zip(before, after, strict=True))
    patches = patches.flatten(1).T
    count, tolerance = len(patches), 1e-3 * float(patches.abs().max())
    for first in range(len(tokens) - count + 1):
        if torch.allclose(tokens[first : first + count], patches, rtol=0, atol=tolerance):
            return first
    raise NoPyramidError("this model's tokens are not its image's patches, row by row, and it has no feature maps")


def _region_embedding(values: Sequence[Value], pooled: int) -> tuple[str, int] | None:
    """The last thing of a region that two linear layers read: what the class and box predictors share."""
    readers: dict[int, int] = {}
    for value in values[pooled:]:
        if value.op in LINEAR and value.weights:
            for parent in value.parents:
                readers[parent] = readers.get(parent, 0) + 1
    shared = [index for index, count in readers.items() if count > 1 and len(values[index].shape) == 2]
    return (name_of(values[shared[-1]]), values[shared[-1]].shape[1]) if shared else None


def _least_side(values: Sequence[Value], pooled: int, levels: Sequence[int]) -> float | None:
    """The least side s, in cells, of regions on their levels, from what went to each: s <= side < 2 s."""
    spans = [
        (levels.index(parent), value.sides)
        for value in values[pooled:]
        for parent in value.parents
        if value.sides and parent in levels and value.shape[-2:] == values[pooled].shape[-2:]
    ]
    ordered = [sides for _, sides in sorted(spans)]
    least = min((low for low, _ in ordered[1:]), default=0.0)
    most = max((high / 2 for _, high in ordered[:-1]), default=0.0)
    # Boxes are continuous, so that both are near s; regions that no octave explains say nothing.
    return (least * most) ** 0.5 if 0 < most <= 1.05 * least else None
