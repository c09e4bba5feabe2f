"""Counts how often the host waits for the device, without a device: see ``elsewhere``.

A wait is whatever needs a number of the device on the host (``item``, ``tolist``, a mask as an index, the size of what
``nonzero`` finds), and every copy between the two that is not asked for with ``non_blocking``. Only those count whose
innermost caller outside PyTorch is a file of this project: torchvision's own are not ours to avoid.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from elsewhere import ELSEWHERE, Away
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gdetkd_cli

_aten = torch.ops.aten
_ASKING = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.bincount,
    _aten._unique2,
    _aten.unique_dim,
    _aten.equal,
    _aten.repeat_interleave,
}
_PROJECT = f"{Path(gdetkd_cli.__file__).parent}/"
_OWN = f"{Path(__file__).parent}/"
_TORCH = f"{Path(torch.__file__).parent}/"


def _site() -> str | None:
    """``file.py:function`` of the project's line that asked; None where another library's did."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_OWN, _TORCH, "<")) and "contextlib" not in name:
            inside = name.startswith(_PROJECT)
            return f"{Path(name).name}:{frame.f_code.co_name}" if inside else None
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
    return None


class _Functions(TorchFunctionMode):
    """What PyTorch does not ask its operators for: numbers to tensors, tensors to lists."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        first = args[0] if args else None
        on_device = isinstance(first, Away)
        made = func in (torch.tensor, torch.as_tensor) and given.get("device") is not None and not on_device
        sent = made and torch.device(given["device"]) == ELSEWHERE
        if sent or (on_device and func in (Tensor.tolist, Tensor.new_tensor)):
            _count(self._found, _site())
        return func(*args, **given)


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if _waits(func, args, given):
            _count(self._found, _site())
        return func(*args, **given)


def _waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [isinstance(one, Away) for one in tensors]
    if func.overloadpacket is _aten._to_copy:
        target = kwargs.get("device")
        moved = target is not None and (torch.device(target) == ELSEWHERE) != away[0]
        return moved and not (kwargs.get("non_blocking") and not away[0])  # to the host it always waits
    if func.overloadpacket is _aten.copy_:
        return away[0] != away[1] and not (not away[1] and len(args) > 2 and args[2])
    if not any(away):
        return False
    masks = func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_)
    masked = masks and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    return masked or func.overloadpacket in _ASKING


def _count(found: Counter[str], site: str | None) -> None:
    if site is not None:
        found[site] += 1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Waits in this block by ``file.py:function``; inside ``elsewhere.machine``."""
    found: Counter[str] = Counter()
    with _Functions(found), _Operators(found):
        yield found
