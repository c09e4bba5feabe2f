"""Finds a model's pyramid by running it, without module paths or knowledge of its code."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from gdetkd_cli.errors import ModelError, NoPyramidError
from gdetkd_cli.memory import check_memory
from gdetkd_cli.probing.flow import LINEAR, Layout, Size
from gdetkd_cli.probing.formats.runner import RecordedCall, Runner, complete_input
from gdetkd_cli.probing.found import FoundLevels
from gdetkd_cli.probing.geometry import Geometry, locate_cells, measure_frame, tile_frame, to_image_pixels
from gdetkd_cli.probing.inputs import Call, ModelInput
from gdetkd_cli.probing.levels import choose_levels, find_levels
from gdetkd_cli.probing.outputs import OutputForm, recognise_form
from gdetkd_cli.probing.record import Address, Output, Value

_SIZE = (480, 640)  # (height, width) in pixels of the usual image
_LEAST_SIDE = 32  # pixels; one cell of the usual coarsest level that a body computes


@dataclass(frozen=True)
class ProbedLevel:
    """A level.

    Attributes:
        name: shown to the user; ``encoder[1]`` for the second slice of a value.
        module: where it is computed, shown beside a name that does not say so: a module's path, or "after" and the
            path of the last module that is known; empty if unknown.
        address: of its value in a forward.
        layout: order of its axes.
        channels: C.
        shape: (height, width) cells.
        cells: their positions in pixels of the network's input.
        geometry: their positions in pixels of the image.
        output: the submodule's output that holds the level, or None.
        first_token: of a level of tokens, the index of the first token of a cell.
        before: (y, x) strides, in pixels of the network's input, of the levels whose tokens precede this level's.
    """

    name: str
    module: str
    address: Address
    layout: Layout
    channels: int
    shape: tuple[int, int]
    cells: Geometry
    geometry: Geometry
    output: Output | None
    first_token: int = 0
    before: tuple[tuple[float, float], ...] = ()

    def as_map(self, value: Tensor, network_size: Sequence[int]) -> Tensor:
        """Converts the value at ``address`` to a map (N, C, H, W); ``network_size`` is in pixels, (height, width)."""
        if self.layout == "NHWC":
            return value.movedim(-1, 1)
        if self.layout == "NCHW":
            return value
        height, width = _count_cells(network_size, self.cells.stride)
        first = self.first_token + sum(prod(_count_cells(network_size, stride)) for stride in self.before)
        cells = value[:, first : first + height * width]
        return cells.transpose(1, 2).unflatten(2, (height, width))


def _count_cells(network_size: Sequence[int], stride: Sequence[float]) -> tuple[int, int]:
    """Counts the whole cells of a stride, (height, width); both arguments are in pixels of the network's input."""
    height, width = (int(n / s + 1e-6) for n, s in zip(network_size, stride, strict=True))
    return height, width


@dataclass(frozen=True)
class Probed:
    """The result of probing.

    Attributes:
        family: two-stage if the model pools regions from maps, else unknown.
        levels: fine to coarse.
        region_embedding: name and channels of the value that a region head's predictors read, or None.
        least_side: smallest side of a region on its level, in cells, or None if the pooled regions do not determine it.
            A region of twice that side belongs to the next level.
        detections: how the model's output is read; None if its form is unknown.
        reason: why these are the levels, shown to the user.
        confidence: how often this rule was right, in 0..1.
        alternatives: names of other candidate sets of maps, with their reasons.
        first: name of the first convolution's module; empty if unknown.
        model_input: how images are prepared for the model, with what its file and the probe added.
        size: (height, width) pixels of the image on which it ran.
        notes: how its images differ from the usual, shown to the user.
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
    model_input: ModelInput
    size: tuple[int, int]
    notes: tuple[str, ...]


def probe(
    runner: Runner,
    size: tuple[int, int] | None,
    model_input: ModelInput,
    chosen: Sequence[str] = (),
    classes: int | None = None,
) -> Probed:
    """Finds the pyramid of a model.

    Args:
        runner: the model, on the CPU.
        size: (height, width) pixels of the image on which the model runs; None: its fixed size, else 480 x 640.
        model_input: how images are prepared for the model, as far as the user said.
        chosen: names of the levels, if the user names them; empty to find them.
        classes: K, or None if unknown.

    Raises:
        ModelError: the image is too small, no known way of calling the model works, or a chosen name matches no value
            or several.
        NoPyramidError: the model has no feature pyramid.
    """
    with warnings.catch_warnings(action="ignore"):  # those of the model
        model_input, image, recorded = _record(runner, size, complete_input(model_input, runner))
        given = model_input.prepare(image)
        call, values = recorded.call, recorded.values
        found = choose_levels(values, _find_values(values, chosen)) if chosen else find_levels(values)
        frame = measure_image_frame(runner, call, image, model_input)
    first_token = _find_first_token(runner, call, given, values, found)
    pooled = next((i for i, v in enumerate(values) if v.op == "roi_align"), None)
    return Probed(
        call=call,
        family="unknown" if pooled is None else "two-stage",
        levels=_describe_levels(values, found, frame, first_token),
        region_embedding=None if pooled is None else _find_region_embedding(values, pooled),
        least_side=None if pooled is None else _estimate_least_side(values, pooled, found.levels),
        detections=recognise_form(recorded.returned, (given.shape[-2], given.shape[-1]), classes),
        reason=found.reason,
        confidence=found.confidence,
        alternatives=tuple((tuple(_name(values[i]) for i in levels), why) for levels, why in found.alternatives),
        first=values[found.stem].module,
        model_input=model_input,
        size=(image.shape[-2], image.shape[-1]),
        notes=_describe_input(runner, call, model_input, (given.shape[-2], given.shape[-1])),
    )


def _record(
    runner: Runner, size: tuple[int, int] | None, model_input: ModelInput
) -> tuple[ModelInput, Tensor, RecordedCall]:
    """Runs the model on the probe image. Returns how images are prepared for it, the image, and the record."""
    image = _draw(size or model_input.fit or _SIZE)
    try:
        return model_input, image, runner.record(model_input.prepare(image))
    except ModelError:
        adapted = runner.adapt(model_input)
        if adapted is None:
            raise
    image = _draw(size or adapted.fit or _SIZE)
    return adapted, image, runner.record(adapted.prepare(image))


def _draw(size: tuple[int, int]) -> Tensor:
    if min(size) < _LEAST_SIDE:
        raise ModelError(
            f"an image of {size[0]} x {size[1]} pixels is too small to find a pyramid with; expected at least "
            f"{_LEAST_SIDE} pixels in height and width"
        )
    return probe_image(size)


def _describe_input(runner: Runner, call: Call, model_input: ModelInput, size: tuple[int, int]) -> tuple[str, ...]:
    """Describes what of the model's input is not the usual; ``size`` is the input's, (height, width) pixels."""
    notes = []
    if runner.size is not None:
        height, width = runner.size
        notes.append(f"takes images of {height} x {width} pixels only, so images are fitted in")
    if call.batch is not None:
        notes.append(f"takes {call.batch} images at a time, so fewer are filled up with copies")
    if call.dtype != torch.float32:
        notes.append(f"takes images as {str(call.dtype).removeprefix('torch.')}")
    if model_input.grey:
        notes.append("takes grey images, so it gets the luminance of the colours")
    if runner.others:
        notes.append(f"also passes {', '.join(other.describe(size) for other in runner.others)}")
    return tuple(notes)


def _describe_levels(
    values: Sequence[Value], found: FoundLevels, frame: Geometry, first_token: int
) -> tuple[ProbedLevel, ...]:
    cells = tuple(
        _locate_level(values, found, index, shape, layout)
        for index, shape, layout in zip(found.levels, found.sizes, found.layouts, strict=True)
    )
    levels = []
    for place, (index, shape, layout) in enumerate(zip(found.levels, found.sizes, found.layouts, strict=True)):
        value = values[index]
        preceding = [i for i, order in enumerate(found.order) if order < found.order[place]]
        levels.append(
            ProbedLevel(
                name=_name(value) + (f"[{found.order[place]}]" if found.order else ""),
                module=_find_module(values, index),
                address=_address(value),
                layout=layout,
                channels=value.shape[1 if layout == "NCHW" else -1],
                shape=shape,
                cells=cells[place],
                geometry=to_image_pixels(frame, cells[place]),
                output=value.returned,
                first_token=first_token,
                before=tuple(cells[i].stride for i in preceding),
            )
        )
    return tuple(levels)


def _locate_level(values: Sequence[Value], found: FoundLevels, index: int, shape: Size, layout: Layout) -> Geometry:
    """Locates a level's cells in pixels of the network's input; tokens lie where the first convolution's cells lie."""
    stem = values[found.stem].shape[-2:]
    located = found.stem if layout == "tokens" and shape == stem else index
    exact = layout == "NCHW" or located == found.stem
    cells = locate_cells(values, found.reference, located) if exact else None
    return cells or tile_frame(values[found.reference].shape[-2:], shape)


def probe_image(size: tuple[int, int]) -> Tensor:
    """Draws an image (3, H, W) in 0..1, smooth blotches under fine noise, always the same.

    Raises:
        MemoryLimitError: no detector could read so large an image in the free memory.
    """
    # The first maps of an ordinary detector have 64 channels of float32 on a quarter of the pixels, three times.
    check_memory(f"an image of {size[0]} x {size[1]} pixels (height x width)", 192 * size[0] * size[1])
    generator = torch.Generator().manual_seed(0)
    coarse = interpolate(torch.rand(1, 3, 12, 16, generator=generator), size=size, mode="bilinear")[0]
    return 0.8 * coarse + 0.2 * torch.rand(3, *size, generator=generator)


def measure_image_frame(runner: Runner, call: Call, image: Tensor, model_input: ModelInput) -> Geometry:
    """Measures where the pixels of the network's input lie in an image (3, H, W) in 0..1."""
    return measure_frame(lambda changed: runner.read(call, [model_input.prepare(changed)], ())[0], image)


def _address(value: Value) -> Address:
    return Address(value.op, value.call, value.output)


def _name(value: Value) -> str:
    """The first that exists of: its name in the file, its submodule's output, the module of its weights, its call."""
    if value.name:
        return value.name
    if value.returned:
        return value.returned.name
    return (not value.output and value.module) or _name_call(value)


def _find_module(values: Sequence[Value], i: int) -> str:
    """Returns ``neck.out3`` if this module computed a value and its name is another, or ``after neck.out3``."""
    name, after = _name(values[i]), ""
    if values[i].name.startswith("/") or (values[i].returned and not values[i].name):
        return ""  # the name is a path
    while not (module := values[i].place or values[i].module):
        if len(values[i].parents) != 1:
            return ""
        i, after = values[i].parents[0], "after "
    return "" if module == name else f"{after}{module}"


def _name_call(value: Value) -> str:
    """``convolution:3``, or ``split:3.1`` for an operator's second output."""
    return f"{value.op}:{value.call}{f'.{value.output}' if value.output else ''}"


def _find_values(values: Sequence[Value], names: Sequence[str]) -> list[int]:
    """Finds the indices of the named values; raises a ModelError if a name matches no value, or several."""
    known: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        own = {value.name, value.returned.name if value.returned else ""}
        # A module's name means its operator's first output, not its statistics, for instance.
        module = "" if value.output else value.module
        for name in (own | {_name_call(value), module}) - {""}:
            known.setdefault(name, []).append(i)
    known = _find_outputs(values) | known
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            raise ModelError(f"the model computes no value named {name!r}{hint}")
        if len(known[name]) > 1:
            calls = ", ".join(_name_call(values[i]) for i in known[name])
            raise ModelError(f"{len(known[name])} values are named {name!r}; choose one by its call: {calls}")
    return [known[name][0] for name in names]


def _find_outputs(values: Sequence[Value]) -> dict[str, list[int]]:
    """Finds, by module, the last value of each of its calls, if the model's file says which module computed a value."""
    found: dict[str, list[int]] = {}
    before: set[str] = set()
    for i, value in enumerate(values):
        if not value.place:
            continue
        parts = value.place.split(".")
        inside = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        for module in inside:
            if module in before:
                found[module][-1] = i
            else:
                found.setdefault(module, []).append(i)
        before = inside
    return found


def _find_first_token(runner: Runner, call: Call, image: Tensor, values: Sequence[Value], found: FoundLevels) -> int:
    """Finds the token of the first patch: from there on, the tokens change like the patches if the image changes.

    Raises:
        NoPyramidError: the tokens do not hold the patches row by row.
    """
    if found.embedded is None:
        return 0
    addresses = [_address(values[i]) for i in (found.stem, found.embedded)]
    before, after = (runner.read(call, [shown], addresses)[1] for shown in (image, image.flip(-1)))
    patches, tokens = ((b - a)[0].double() for a, b in zip(before, after, strict=True))
    patches = patches.flatten(1).T
    count, tolerance = len(patches), 1e-3 * float(patches.abs().max())
    for first in range(len(tokens) - count + 1):
        if torch.allclose(tokens[first : first + count], patches, rtol=0, atol=tolerance):
            return first
    raise NoPyramidError(
        "this model has no feature maps, and its tokens are not the image's patches row by row; expected either"
    )


def _find_region_embedding(values: Sequence[Value], pooled: int) -> tuple[str, int] | None:
    """Name and channels of the last value after pooling that two linear layers read, the class and box predictors."""
    readers: dict[int, int] = {}
    for value in values[pooled:]:
        if value.op in LINEAR and value.weights:
            for parent in value.parents:
                readers[parent] = readers.get(parent, 0) + 1
    shared = [index for index, count in readers.items() if count > 1 and len(values[index].shape) == 2]
    return (_name(values[shared[-1]]), values[shared[-1]].shape[1]) if shared else None


def _estimate_least_side(values: Sequence[Value], pooled: int, levels: Sequence[int]) -> float | None:
    """Estimates s, in cells, if the sides of the regions pooled from each level are in s <= side < 2 s."""
    spans = [
        (levels.index(parent), value.sides)
        for value in values[pooled:]
        for parent in value.parents
        if value.sides and parent in levels and value.shape[-2:] == values[pooled].shape[-2:]
    ]
    ordered = [sides for _, sides in sorted(spans)]
    least = min((low for low, _ in ordered[1:]), default=0.0)
    most = max((high / 2 for _, high in ordered[:-1]), default=0.0)
    # Sides are continuous, so both bounds are near s. If they cross, the model assigns regions by another rule.
    return (least * most) ** 0.5 if 0 < most <= 1.05 * least else None
