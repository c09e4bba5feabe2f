"""Runs a model and reads its values, independent of its file format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError, get_first_line
from gdetkd_cli.probing.hooks import HookReader
from gdetkd_cli.probing.inputs import Call, stack_images, take_channels_last, take_single
from gdetkd_cli.probing.record import AddName, Address, Value, read, record

RUN_ERRORS = (RuntimeError, torch.jit.Error)  # of PyTorch; the second is raised by scripted code
_CALL_ERRORS = (*RUN_ERRORS, TypeError, ValueError, AttributeError, LookupError, AssertionError)
_ORDINARY = (480, 640)  # pixels (height, width), to which no model is likely to be bound
# Sides of the squares with which models are traced, the most frequent first.
_USUAL_SIDES = (640, 416, 320, 512, 300, 800, 608, 224, 256, 1024, 384, 448, 550, 600, 768, 896, 960, 1280, 128, 96, 64)
_MARKED = re.compile(r"[\w.]*Error: (.+)")
# Ways of calling a module, tried in this order.
CALLS = (
    Call("list of (3, H, W) images", "any", list),
    Call("(N, 3, H, W) tensor", "one size", stack_images),
    Call("one (3, H, W) image", "one", take_single),
)


def list_calls(*, last: bool) -> tuple[Call, ...]:
    """Returns the ways of calling a module that takes its channels first or, with ``last``, last."""
    return tuple(map(take_channels_last, CALLS)) if last else CALLS


@dataclass(frozen=True)
class RecordedCall:
    """One forward.

    Attributes:
        call: how the model was called.
        values: the values that it computed.
        returned: its output; tensors by name if the file names its outputs.
    """

    call: Call
    values: tuple[Value, ...]
    returned: object


class Runner(Protocol):
    """A model as probing uses it.

    Attributes:
        module: the weights, if they are torch's; else an empty module.
        parameters: number of parameters.
        size: (height, width) if the model takes only this size, else None.
        bytes: whether it takes whole numbers 0..255.
        class_names: from the model's file; empty if it has none.
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def parameters(self) -> int: ...

    @property
    def size(self) -> tuple[int, int] | None: ...

    @property
    def bytes(self) -> bool: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def list_bad_weights(self) -> list[str]:
        """Names of the weights with NaN or infinity."""

    def record(self, image: Tensor) -> RecordedCall:
        """Finds a way of calling the model and records a forward of one image (3, H, W).

        Raises:
            ModelError: no known way of calling the model works.
            NoPyramidError: the model has no convolution.
        """

    def read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        """Reads the first convolution's input (N, C, H, W) and the values at the addresses, for images in one call.

        Raises:
            NoPyramidError: there is no convolution.
            ModelError: the forward ended without one of the values.
        """

    def run(self, call: Call, images: Sequence[Tensor]) -> object:
        """Runs the model on images in one call; returns tensors by name if the file names its outputs."""


def list_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors with NaN or infinity."""
    return [name for name, one in tensors.items() if one.is_floating_point() and not one.isfinite().all()]


def find_reason(error: Exception) -> str:
    """Returns the line of an error's message with the reason, which may follow TorchScript's own traceback."""
    marked = [found[1] for line in str(error).splitlines() if (found := _MARKED.fullmatch(line.strip()))]
    return marked[-1] if marked else get_first_line(error)


@runtime_checkable
class NamesValues(Protocol):
    """A module whose file names its values."""

    def run_with_names(self, argument: object, add_name: AddName) -> object:
        """Runs a forward and names each value as it is computed."""


class ModuleRunner:
    """A module in evaluation mode: eager, TorchScript or an exported program."""

    bytes = False

    def __init__(
        self,
        module: nn.Module,
        *,
        calls: Sequence[Call] = CALLS,
        size: tuple[int, int] | None = None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.module = module
        self.class_names = class_names
        self.size = size
        self._calls = calls
        self._hooks: HookReader | None = None  # set by ``record``

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @torch.no_grad()
    def find_size(self) -> tuple[int, int] | None:
        """Returns the (height, width) of a module that fails on ordinary images and works on squares of a usual size.

        Most tools trace a model with one image, and its size becomes a constant of the file. None if ordinary images
        work, or if no usual size does.
        """
        for size in (_ORDINARY, *((side, side) for side in _USUAL_SIDES)):
            if any(self._accepts(call, size) for call in self._calls):
                return None if size == _ORDINARY else size
        return None

    def _accepts(self, call: Call, size: tuple[int, int]) -> bool:
        try:
            self.run(call, [torch.full((3, *size), 0.5)])
        except _CALL_ERRORS:
            return False
        return True

    def list_bad_weights(self) -> list[str]:
        return list_not_finite(self.module.state_dict())

    def record(self, image: Tensor) -> RecordedCall:
        weights = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        scripted = isinstance(self.module, torch.jit.ScriptModule)  # its submodules take no hooks
        submodules = {} if scripted else {name: module for name, module in self.module.named_modules() if name}
        reasons = []
        for call in self._calls:
            try:
                found = record(partial(self._run_with_names, call, [image]), weights, [image], submodules)
                self._hooks = HookReader(self.module, found.values) if submodules else None
                return RecordedCall(call, found.values, found.returned)
            except _CALL_ERRORS as error:
                reasons.append(f"{call.name}: {find_reason(error)}")
        if weights and all(tensor.dim() < 4 for tensor in weights.values()):
            raise NoPyramidError(NO_CONVOLUTION)  # for instance a text model
        raise ModelError(
            f"no known way of calling this model works with an image of {image.shape[-2]} x {image.shape[-1]} pixels "
            f"({'; '.join(reasons)}); if the model has a fixed input size, give it with --size"
        )

    def read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        run = partial(self.run, call, images)
        if self._hooks is None or not self._hooks.can_read(addresses):
            return read(run, addresses)
        own = self._hooks.read(run, addresses)
        if own is None or not self._hooks.is_checked(addresses):  # the first time, read both ways
            expected = read(run, addresses)
            self._hooks.check(addresses, own, expected)
            return expected
        return own

    def _run_with_names(self, call: Call, images: Sequence[Tensor], add_name: AddName) -> object:
        if isinstance(self.module, NamesValues):
            return self.module.run_with_names(call.argument(images), add_name)
        return self.run(call, images)

    def run(self, call: Call, images: Sequence[Tensor]) -> object:
        return self.module(call.argument(images))
