"""Reads values as outputs of submodules. This is faster than ``record.read``, which runs Python at every operator."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.probing.record import Address, Output, ReadingDoneError, Value, list_tensors

Reading = tuple[Tensor, list[Tensor]]  # the first convolution's input (N, C, H, W), and the values


class HookReader:
    """Reads values of a recorded model that are outputs of its submodules.

    Args:
        values: of its record, with the submodules' outputs.
    """

    def __init__(self, module: nn.Module, values: Sequence[Value]) -> None:
        self._module = module
        self._outputs = {Address(v.op, v.call, v.output): v.returned for v in values if v.returned is not None}
        self._first = _find_first_convolution(module, values)
        self._agrees: dict[tuple[Address, ...], bool] = {}

    def can_read(self, addresses: Sequence[Address]) -> bool:
        """Whether hooks reach the network's input and all of these values, and no check has failed."""
        reachable = self._first is not None and bool(addresses) and all(a in self._outputs for a in addresses)
        return reachable and self._agrees.get(tuple(addresses), True)

    def is_checked(self, addresses: Sequence[Address]) -> bool:
        return tuple(addresses) in self._agrees

    def check(self, addresses: Sequence[Address], own: Reading | None, expected: Reading) -> None:
        """Compares the hooks' reading with that of ``record.read``: a model may change a value after its hook ran."""
        agrees = own is not None and own[0].shape == expected[0].shape
        if agrees and own is not None:
            agrees = all(_is_same(a, b) for a, b in zip(own[1], expected[1], strict=True))
        self._agrees[tuple(addresses)] = agrees

    @torch.no_grad()
    def read(self, call: Callable[[], object], addresses: Sequence[Address]) -> Reading | None:
        """Reads the values while ``call`` runs the model, then stops it; None if the forward ends without one."""
        outputs = [self._outputs[address] for address in addresses]
        network: list[Tensor] = []
        found: dict[Output, Tensor] = {}
        calls: Counter[str] = Counter()
        by_module: Mapping[str, set[Output]] = defaultdict(set)
        for output in outputs:
            by_module[output.module].add(output)

        def keep_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            network.extend(inputs[:1])

        def keep_output(name: str, _: nn.Module, __: Any, result: Any) -> None:
            for output in by_module[name]:
                if output.call == calls[name]:
                    found[output] = list_tensors(result)[output.leaf].clone()  # a later operator may write into it
            calls[name] += 1
            if len(found) == len(set(outputs)):
                raise ReadingDoneError

        assert self._first is not None
        hooks: list[Any] = [self._first.register_forward_pre_hook(keep_input)]
        hooks += [self._module.get_submodule(n).register_forward_hook(partial(keep_output, n)) for n in by_module]
        try:
            call()
        except ReadingDoneError:
            return (network[0], [found[output] for output in outputs]) if network else None
        finally:
            for hook in hooks:
                hook.remove()
        return None


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, where NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _find_first_convolution(module: nn.Module, values: Sequence[Value]) -> nn.Module | None:
    """Returns the first convolution's module, or None if it pads or changes its input before convolving."""
    first = next((v for v in values if v.op == "convolution" and v.parents), None)
    named = dict(module.named_modules()).get(first.module) if first is not None else None
    return named if type(named) is nn.Conv2d and named.padding_mode == "zeros" else None
