"""A second device where there is none: tensors that say they are elsewhere, and are computed on the CPU.

On one device alone nothing shows that a tensor was made on the wrong one; with CUDA the first step would fail. Under
``machine`` the device ``ELSEWHERE`` exists, whose tensors do not mix with the CPU's any more than CUDA's do: only
scalars and indices may come from the CPU. PyTorch calls it "meta", the one device that autograd knows everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
_aten = torch.ops.aten
_MOVES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
)


class Away(Tensor):
    """A tensor elsewhere; ``here`` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), dtype=here.dtype, device=ELSEWHERE
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [one for one in tensors if isinstance(one, Away)]
    here = [one for one in tensors if not isinstance(one, Away)]
    assert not any(one.is_meta for one in here), f"{func}: a tensor without values"
    if away and func not in _MOVES:
        indexed = func in _INDEXING and isinstance(args[0], Away)
        mixed = [one for one in here if one.dim() and not (indexed and not one.is_floating_point())]
        if mixed:
            raise RuntimeError(f"{func}: a tensor of the CPU, {tuple(mixed[0].shape)}, among others that are elsewhere")
    own_args, own_kwargs = tree_map(lambda leaf: leaf.here if isinstance(leaf, Away) else leaf, (args, dict(kwargs)))
    device = kwargs.get("device")
    if device is not None:
        own_kwargs["device"] = torch.device("cpu")
    found = func(*own_args, **own_kwargs)
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.name.endswith("_") and isinstance(found, Tensor):
        return args[0]  # changed in place
    to_elsewhere = bool(away) if device is None else torch.device(device) == ELSEWHERE
    return tree_map(lambda leaf: Away(leaf) if isinstance(leaf, Tensor) else leaf, found) if to_elsewhere else found


class _Operators(TorchDispatchMode):
    """Tensors that are made elsewhere: of nothing that is there, so that no ``Away`` would be asked."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Tensors made of Python's numbers, and numbers of tensors: PyTorch does not ask its operators for them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and not isinstance(first, Tensor):
            device = given.pop("device", None)
            made = func(*args, **given)
            return made if device is None else made.to(device)
        if func is Tensor.new_tensor and isinstance(first, Away):
            return torch.tensor(args[1], dtype=given.get("dtype", first.dtype)).to(ELSEWHERE)
        if func is Tensor.__getitem__ and isinstance(first, Away):
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            return func(first, tuple(torch.tensor(key) if isinstance(key, list) else key for key in keys))
        if func is Tensor.tolist and isinstance(first, Away):
            return first.here.tolist()
        return func(*args, **given)


@contextmanager
def machine() -> Iterator[None]:
    """In this block there is a second device."""

    def no_autocast(*_: Any, **__: Any) -> nullcontext[None]:  # it knows the devices that there are
        return nullcontext()

    def fused() -> list[str]:
        return ["cpu", ELSEWHERE.type]

    with pytest.MonkeyPatch.context() as patch, _Literals(), _Operators():
        patch.setattr(torch, "autocast", no_autocast)
        patch.setattr(import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", fused)
        yield
