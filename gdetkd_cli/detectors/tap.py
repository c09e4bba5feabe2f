"""Reads intermediate tensors of a module during one forward."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from gdetkd_cli.errors import TapError


class Tap:
    """Records inputs and outputs of named submodules inside a ``with`` block.

        with Tap(model, ["roi_heads.box_head"]) as tap:
            model(images)
        features = tap.output("roi_heads.box_head")

    All hooks are removed when the block ends, also after an exception.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        submodules: Mapping[str, nn.Module] = dict(module.named_modules())
        missing = [name for name in names if name not in submodules]
        if missing:
            raise TapError(f"{type(module).__name__} has no submodule named {missing[0]!r}")
        self._submodules = {name: submodules[name] for name in names}
        self._records: dict[str, list[tuple[tuple[Any, ...], Any]]] = {name: [] for name in names}
        self._handles: list[Any] = []

    def __enter__(self) -> Tap:
        for name, submodule in self._submodules.items():
            records = self._records[name]

            def record(
                _: nn.Module, inputs: tuple[Any, ...], output: Any, records: list[tuple[tuple[Any, ...], Any]] = records
            ) -> None:
                records.append((inputs, output))

            self._handles.append(submodule.register_forward_hook(record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def outputs(self, name: str) -> list[Any]:
        """The submodule's output at each of its calls.

        Raises:
            TapError: it did not run.
        """
        if not self._records[name]:
            raise TapError(f"{name!r} did not run in this forward")
        return [output for _, output in self._records[name]]

    def inputs(self, name: str) -> tuple[Any, ...]:
        """The positional arguments of the submodule's only call.

        Raises:
            TapError: it did not run, or ran more than once.
        """
        self.output(name)
        return self._records[name][0][0]

    def output(self, name: str) -> Any:
        """The submodule's output at its only call.

        Raises:
            TapError: it did not run, or ran more than once.
        """
        outputs = self.outputs(name)
        if len(outputs) > 1:
            raise TapError(f"{name!r} ran {len(outputs)} times in this forward; one was expected")
        return outputs[0]
