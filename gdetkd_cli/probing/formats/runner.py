"""A model that can be run and looked into, whatever its file's format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError, first_line
from gdetkd_cli.probing.hooks import HookReader
from gdetkd_cli.probing.inputs import Call, alone, channels_last, stacked
from gdetkd_cli.probing.record import Address, Tell, Value, read, record

RUN_ERRORS = (RuntimeError, torch.jit.Error)  # of PyTorch; the second is what scripted code raises itself
_MARKED = re.compile(r"[\w.]*Error: (.+)")
# Ways of calling a module, tried in this order.
CALLS = (
    Call("list of (3, H, W) images", "any", list),
    Call("(N, 3, H, W) tensor", "one size", stacked),
    Call("one (3, H, W) image", "one", alone),
)


def calls_for(*, last: bool) -> tuple[Call, ...]:
    """Ways of calling a module that takes its channels first, or last."""
    return tuple(map(channels_last, CALLS)) if last else CALLS


@dataclass(frozen=True)
class Recorded:
    """One forward: how the model was called, what it computed, and what it returned (tensors by name, of a file that
    names its outputs)."""

    call: Call
    values: tuple[Value, ...]
    returned: object


class Runner(Protocol):
    """What probing needs of a model.

    Attributes:
        module: holds the weights where torch does, so that they can be moved; otherwise it is empty.
        parameters: number of the model's parameters.
        size: (height, width), where it takes images of this size alone.
        bytes: whether it takes whole numbers 0..255.
        class_names: of what it detects, where its file tells; else empty.
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

    def record(self, image: Tensor) -> Recorded:
        """Finds out how the model is called, and what it computes of one image (3, H, W).

        Raises:
            ModelError: it cannot be called in any known way.
            NoPyramidError: nothing in it could be a feature map.
        """

    def read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        """What the first convolution reads, (N, C, H, W), and the values at the addresses, of images in one call.

        Raises:
            NoPyramidError: there is no convolution.
            ModelError: the forward ended without one of the values.
        """

    def run(self, call: Call, images: Sequence[Tensor]) -> object:
        """What the model returns for images in one call; of a file with named outputs, tensors by name."""


def reason_of(error: Exception) -> str:
    """The line of an error's message that says what is wrong; TorchScript puts its own traceback before it."""
    marked = [found[1] for line in str(error).splitlines() if (found := _MARKED.fullmatch(line.strip()))]
    return marked[-1] if marked else first_line(error)


@runtime_checkable
class NamesValues(Protocol):
    """A module whose file names its values."""

    def run_told(self, argument: object, tell: Tell) -> object:
        """A forward that tells each value's name as it is made."""


class ModuleRunner:
    """An nn.Module in evaluation mode: eager, TorchScript, or of an exported program."""

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
        self._hooks: HookReader | None = None  # known once the model was recorded

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def record(self, image: Tensor) -> Recorded:
        weights = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        scripted = isinstance(self.module, torch.jit.ScriptModule)  # whose submodules take no hooks
        submodules = {} if scripted else {name: module for name, module in self.module.named_modules() if name}
        reasons = []
        for call in self._calls:
            try:
                found = record(partial(self._told, call, [image]), weights, [image], submodules)
                self._hooks = HookReader(self.module, found.values) if submodules else None
                return Recorded(call, found.values, found.returned)
            except (*RUN_ERRORS, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
                reasons.append(f"{call.name}: {reason_of(error)}")
        if weights and all(tensor.dim() < 4 for tensor in weights.values()):
            raise NoPyramidError(NO_CONVOLUTION)  # a text model, for instance, which takes no images at all
        raise ModelError(
            f"the model cannot be called with an image of {image.shape[-2]} x {image.shape[-1]} pixels in any known "
            f"way ({'; '.join(reasons)}); if it was made for one size, give that with --size"
        )

    def read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        run = partial(self.run, call, images)
        if self._hooks is None or not self._hooks.reads(addresses):
            return read(run, addresses)
        own = self._hooks.read(run, addresses)
        if own is None or not self._hooks.is_checked(addresses):  # once in a model's life both ways
            expected = read(run, addresses)
            self._hooks.check(addresses, own, expected)
            return expected
        return own

    def _told(self, call: Call, images: Sequence[Tensor], tell: Tell) -> object:
        """As ``run``; a graph whose values have names tells them."""
        if isinstance(self.module, NamesValues):
            return self.module.run_told(call.argument(images), tell)
        return self.run(call, images)

    def run(self, call: Call, images: Sequence[Tensor]) -> object:
        return self.module(call.argument(images))
