"""Runs a model and reads its values, independent of its file format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError, get_first_line
from gdetkd_cli.probing.formats.declared import describe_channels
from gdetkd_cli.probing.formats.search import find_way, list_batches
from gdetkd_cli.probing.hooks import HookReader
from gdetkd_cli.probing.inputs import Call, ModelInput, stack_images, take_channels_last, take_single
from gdetkd_cli.probing.record import AddName, Address, Value, read, record
from gdetkd_cli.probing.second_inputs import SecondInput, describe_unknown

RUN_ERRORS = (RuntimeError, torch.jit.Error)  # of PyTorch; the second is raised by scripted code
_CALL_ERRORS = (*RUN_ERRORS, TypeError, ValueError, AttributeError, LookupError, AssertionError)
_MARKED = re.compile(r"[\w.]*Error: (.+)")
_CHANNELS = re.compile(r"to have (\d+) channels, but got 3 channels")  # of a convolution's error
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
        values: the values that it computed, with shapes as for one image.
        returned: its output for one image; tensors by name if the file names its outputs.
    """

    call: Call
    values: tuple[Value, ...]
    returned: object

    @classmethod
    def of(cls, call: Call, values: Sequence[Value], returned: object) -> RecordedCall:
        """Describes a forward of one image, which may have been repeated to fill a batch."""
        if call.batch is not None:
            values = [replace(v, shape=(1, *v.shape[1:])) if v.shape[:1] == (call.batch,) else v for v in values]
        return cls(call, tuple(values), call.keep(returned, 1))


class Runner(Protocol):
    """A model as probing uses it.

    Attributes:
        module: the weights, if they are torch's; else an empty module.
        size: (height, width) if the model takes only this size, else None.
        bytes: whether it takes whole numbers 0..255.
        grey: whether it takes images of one channel.
        others: its inputs besides the image.
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
    def grey(self) -> bool: ...

    @property
    def others(self) -> tuple[SecondInput, ...]: ...

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

    def adapt(self, model_input: ModelInput) -> ModelInput | None:
        """Finds how a model takes images after ``record`` failed, and calls it so from then on; None if in no way."""

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

    def run_with_names(self, arguments: Sequence[object], add_name: AddName) -> object:
        """Runs a forward and names each value as it is computed."""


class ModuleRunner:
    """A module in evaluation mode: eager, TorchScript or an exported program."""

    def __init__(
        self,
        module: nn.Module,
        *,
        calls: Sequence[Call] = CALLS,
        size: tuple[int, int] | None = None,
        grey: bool = False,
        class_names: tuple[str, ...] = (),
        inputs: Sequence[SecondInput | None] = (None,),
        unknown: Sequence[str] = (),
    ) -> None:
        """Takes a module.

        Args:
            module: in evaluation mode.
            calls: ways of calling it, in the order of trying.
            size: (height, width) if it takes only this size.
            grey: it takes images of one channel.
            inputs: its inputs in their order; None stands for the image.
            unknown: names of further inputs, for which there is no value.
        """
        self.module = module
        self.class_names = class_names
        self.size = size
        self.grey = grey
        self._calls = calls
        self._inputs, self._unknown = inputs, unknown
        self._hooks: HookReader | None = None  # set by ``record``

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def bytes(self) -> bool:
        return self._calls[0].dtype == torch.uint8

    @property
    def others(self) -> tuple[SecondInput, ...]:
        return tuple(one for one in self._inputs if one is not None)

    @torch.no_grad()
    def adapt(self, model_input: ModelInput) -> ModelInput | None:
        if not isinstance(self.module, torch.jit.ScriptModule) or self._unknown:  # others declare their input
            return None
        found = find_way(self._accepts, self._calls, list_batches(self.module), self.size)
        if found is None:
            return None
        call, channels, size = found
        self._calls, self.grey, self.size = (call,), channels == 1, size
        return complete_input(model_input, self)

    def _accepts(self, call: Call, channels: int, size: tuple[int, int]) -> bool:
        try:
            self.run(call, [torch.full((channels, *size), 0.5)])
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
        for call in () if self._unknown else self._calls:
            try:
                found = record(partial(self._run_with_names, call, [image]), weights, [image], submodules)
                self._hooks = HookReader(self.module, found.values) if submodules else None
                return RecordedCall.of(call, found.values, found.returned)
            except _CALL_ERRORS as error:
                reasons.append(f"{call.name}: {self._explain(call, image, error)}")
        if weights and all(tensor.dim() < 4 for tensor in weights.values()):
            raise NoPyramidError(NO_CONVOLUTION)  # for instance a text model
        if self._unknown:
            raise ModelError(describe_unknown("this model", self._unknown))
        channels = _CHANNELS.search(" ".join(reasons))
        if channels is not None and channels[1] != "1":
            raise ModelError(describe_channels("this model", int(channels[1])))
        raise ModelError(
            f"no known way of calling this model works with an image of {image.shape[-2]} x {image.shape[-1]} pixels "
            f"({'; '.join(reasons)}); if the model has a fixed input size, give it with --size"
        )

    def _explain(self, call: Call, image: Tensor, error: Exception) -> str:
        """Returns the reason of a failed call of one image."""
        if isinstance(self.module, torch.jit.ScriptModule):  # loses an error's text while its operators are recorded
            try:
                self._run_batch(call, [image])
            except _CALL_ERRORS as own:
                return find_reason(own)
        return find_reason(error)

    def read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        network_input, values = self._read(call, images, addresses)
        count = len(images)
        if call.batch is not None:
            network_input, values = network_input[:count], [v[:count] if call.is_batch(v) else v for v in values]
        if call.dtype in (torch.float16, torch.bfloat16):
            network_input, values = network_input.float(), [value.float() for value in values]
        return network_input, values

    def _read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        run = partial(self._run_batch, call, images)
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
            return self.module.run_with_names(self._list_arguments(call, images), add_name)
        return self._run_batch(call, images)

    def run(self, call: Call, images: Sequence[Tensor]) -> object:
        return call.keep(self._run_batch(call, images), len(images))

    def _run_batch(self, call: Call, images: Sequence[Tensor]) -> object:
        return self.module(*self._list_arguments(call, images))

    def _list_arguments(self, call: Call, images: Sequence[Tensor]) -> list[object]:
        given = call.argument(images)
        count, size = call.batch or len(images), (images[0].shape[-2], images[0].shape[-1])
        return [given if one is None else one.compute(count, size, images[0].device) for one in self._inputs]


def complete_input(model_input: ModelInput, runner: Runner) -> ModelInput:
    """Adds what is known of a model's images to what the user said about them."""
    return replace(
        model_input,
        scale=255.0 if runner.bytes else model_input.scale,
        grey=runner.grey,
        fit=model_input.fit or runner.size,
    )
