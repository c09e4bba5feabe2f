"""Reading values as what submodules return: no Python runs beside the operators, as it does in ``record.read``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.probing.record import Address, Output, Value, tensors_in

Read = tuple[Tensor, list[Tensor]]  # what the first convolution reads, (N, C, H, W), and the values


class _SeenError(Exception):
    """Everything that was wanted has been read; the rest of the forward is not needed."""


class HookReader:
    """Where a recorded model's values can be had as its submodules' outputs.

    Args:
        module: the model.
        values: of its record, which was made with the submodules' outputs.
    """

    def __init__(self, module: nn.Module, values: Sequence[Value]) -> None:
        self._module = module
        self._outputs = {Address(v.op, v.call, v.output): v.returned for v in values if v.returned is not None}
        self._first = _first_convolution(module, values)
        self._agrees: dict[tuple[Address, ...], bool] = {}

    def reads(self, addresses: Sequence[Address]) -> bool:
        """Whether all of these are submodules' outputs; the network's input must be what its convolution is given."""
        wanted = self._first is not None and bool(addresses) and all(a in self._outputs for a in addresses)
        return wanted and self._agrees.get(tuple(addresses), True)

    def is_checked(self, addresses: Sequence[Address]) -> bool:
        return tuple(addresses) in self._agrees

    def check(self, addresses: Sequence[Address], own: Read | None, expected: Read) -> None:
        """Remembers whether hooks give what was read operator by operator: a model may do what no record shows."""
        agrees = own is not None and own[0].shape == expected[0].shape
        if agrees and own is not None:
            agrees = all(torch.equal(a, b) for a, b in zip(own[1], expected[1], strict=True))
        self._agrees[tuple(addresses)] = agrees

    @torch.no_grad()
    def read(self, call: Callable[[], object], addresses: Sequence[Address]) -> Read | None:
        """Reads the values while ``call`` runs the model, then stops it; None where one did not come."""
        outputs = [self._outputs[address] for address in addresses]
        network: list[Tensor] = []
        found: dict[Output, Tensor] = {}
        calls: Counter[str] = Counter()
        by_module: Mapping[str, set[Output]] = defaultdict(set)
        for output in outputs:
            by_module[output.module].add(output)

        def entered(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            network.extend(inputs[:1])

        def returned(name: str, _: nn.Module, __: Any, result: Any) -> None:
            for output in by_module[name]:
                if output.call == calls[name]:
                    found[output] = tensors_in(result)[output.leaf].clone()  # a later operator may write into it
            calls[name] += 1
            if len(found) == len(set(outputs)):
                raise _SeenError

        assert self._first is not None
        hooks: list[Any] = [self._first.register_forward_pre_hook(entered)]
        hooks += [self._module.get_submodule(n).register_forward_hook(partial(returned, n)) for n in by_module]
        try:
            call()
        except _SeenError:
            return (network[0], [found[output] for output in outputs]) if network else None
        finally:
            for hook in hooks:
                hook.remove()
        return None


def _first_convolution(module: nn.Module, values: Sequence[Value]) -> nn.Module | None:
    """The module whose input is that of the first convolution: one that pads by itself hands on another."""
    first = next((v for v in values if v.op == "convolution" and v.parents), None)
    named = dict(module.named_modules()).get(first.module) if first is not None else None
    return named if type(named) is nn.Conv2d and named.padding_mode == "zeros" else None
