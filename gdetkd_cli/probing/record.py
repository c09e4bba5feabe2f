"""What a model computes in one forward, operator by operator.

Operators are seen where PyTorch dispatches them, beneath Python: an eager module and a TorchScript file, scripted or
traced, give the same record, and no module path has to be known. Values are described, not kept.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError

# These take a tensor's shape or type, and nothing of its values.
_FRESH = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("new_", ""), ("", "_like"))
)
_NAMES = {"_convolution": "convolution"}  # the same operator, as traced models call it


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution or a pooling, (y, x) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Output:
    """Where a value can be had with its gradient: tensor ``leaf`` of the ``of`` that a submodule's call returns."""

    module: str
    call: int
    leaf: int
    of: int = 1

    @property
    def name(self) -> str:
        """``neck.out3``; ``neck.0`` for the first of several, ``neck:1`` for the second call."""
        element = self.module if self.of == 1 else f"{self.module}.{self.leaf}"
        return f"{element}:{self.call}" if self.call else element


@dataclass(frozen=True)
class Value:
    """One floating-point tensor that an operator gave.

    Attributes:
        op: the operator, for example ``convolution``.
        call: which call of that operator it was, counted from 0 at the first convolution: what a model does to each
            image before that depends on how many there are.
        output: which of the operator's outputs.
        shape: of the tensor.
        parents: indices of the recorded values that the operator read.
        weights: names of the parameters and buffers that it read.
        window: of a convolution, pooling or padding.
        sides: of RoIAlign, the least and the greatest side of its boxes, in cells of the map.
        name: in the model's file; empty where only modules and operators have names.
        returned: the innermost submodule's output that it is, where there is one.
        result: whether the model returned it.
    """

    op: str
    call: int
    output: int
    shape: tuple[int, ...]
    parents: tuple[int, ...]
    weights: tuple[str, ...] = ()
    window: Window | None = None
    sides: tuple[float, float] | None = None
    name: str = ""
    returned: Output | None = None
    result: bool = False

    @property
    def module(self) -> str:
        """The module whose weights made it, or that its name in an ONNX file tells; empty where neither does."""
        if self.name.startswith("/"):  # as torch.onnx names them: /neck/out3/Conv_output_0
            return ".".join(self.name.split("/")[1:-1])
        known = bool(self.weights) and not self.weights[0].startswith("constant ")
        return self.weights[0].rpartition(".")[0] if known else ""


@dataclass(frozen=True)
class Record:
    """One forward.

    Attributes:
        values: floating-point values in the order of their making; the inputs come first.
        results: by leaf tensor of what the model returned, the index of its value; None where it has none.
        returned: what the model returned.
    """

    values: tuple[Value, ...]
    results: tuple[int | None, ...]
    returned: object


Tell = Callable[[str, object], None]  # a name in the model's file, and the value that it is of


@torch.no_grad()
def record(
    call: Callable[[Tell], object],
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    submodules: Mapping[str, nn.Module] | None = None,
) -> Record:
    """Runs ``call`` once.

    Args:
        call: runs the model on the inputs, and returns what the model returns; it may tell the names of values.
        weights: the model's parameters and buffers by name.
        inputs: the tensors that it is given.
        submodules: by name, those whose outputs are of interest.
    """
    recorder = _Recorder(weights)
    for tensor in inputs:
        recorder.add(Value("input", len(recorder.values), 0, tuple(tensor.shape), ()), tensor)
    hooks = [m.register_forward_hook(partial(recorder.returned, name)) for name, m in (submodules or {}).items()]
    try:
        with recorder:
            result = call(recorder.told)
    finally:
        for hook in hooks:
            hook.remove()
    results = tuple(recorder.index_of(leaf) for leaf in tensors_in(result))
    values = [
        replace(value, name=recorder.names.get(i, ""), returned=recorder.outputs.get(i), result=i in results)
        for i, value in enumerate(recorder.values)
    ]
    return Record(tuple(values), results, result)


def tensors_in(result: object) -> list[Tensor]:
    """The tensors of what a model or submodule returned, in their order."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self._index: dict[int, int] = {}  # id of a living tensor -> its value
        # By address: an operator may be given a view of a parameter. Tensors without elements have none.
        self._weights = {t.untyped_storage().data_ptr(): name for name, t in weights.items() if t.numel()}
        self._aliases: list[Tensor] = []  # kept alive, so that nothing else gets their addresses
        self._calls: Counter[str] = Counter()
        self._module_calls: Counter[str] = Counter()
        self.outputs: dict[int, Output] = {}
        self.names: dict[int, str] = {}

    def told(self, name: str, result: object) -> None:
        """The name of what was just made."""
        index = self.index_of(result) if isinstance(result, Tensor) else None
        if index is not None:  # later ones are names of the same
            self.names.setdefault(index, name)

    def returned(self, name: str, module: nn.Module, inputs: object, result: object) -> None:
        """A submodule returned: a forward hook."""
        tensors = tensors_in(result)
        for leaf, tensor in enumerate(tensors):
            index = self.index_of(tensor)
            if index is not None:  # the innermost returns first
                self.outputs.setdefault(index, Output(name, self._module_calls[name], leaf, len(tensors)))
        self._module_calls[name] += 1

    def add(self, value: Value, tensor: Tensor) -> None:
        key = id(tensor)
        if key not in self._index:
            weakref.finalize(tensor, self._index.pop, key, None)  # another tensor may get this id later
        self._index[key] = len(self.values)
        self.values.append(value)

    def index_of(self, tensor: Tensor) -> int | None:
        return self._index.get(id(tensor))

    def _weight(self, tensor: Tensor) -> str:
        """A parameter's name; what else no operator made is a constant of the graph, as a frozen model's weights."""
        pointer = tensor.untyped_storage().data_ptr()
        return self._weights.setdefault(pointer, f"constant {len(self._weights)}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        fresh = func.overloadpacket.__name__ in _FRESH
        parents = () if fresh else tuple(index for t in read if (index := self.index_of(t)) is not None)
        weights = tuple(self._weight(t) for t in read if self.index_of(t) is None and t.dim() and t.numel())
        op = _NAMES.get(name := func.overloadpacket.__name__, name)
        if op == "convolution" and op not in self._calls:
            self._calls.clear()
        call = self._calls[op]
        self._calls[op] += 1
        result = func(*_tensors(func, args), **kwargs)
        if weights and not parents:  # a weight transposed, converted or scaled is that weight
            aliases = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
            self._weights.update((t.untyped_storage().data_ptr(), weights[0]) for t in aliases)
            self._aliases += aliases
            return result
        for output, tensor in enumerate(tensors_in(result)):
            if tensor.is_floating_point():
                shape = tuple(tensor.shape)
                sides = sides_of(args[1], float(args[2])) if op == "roi_align" else None
                self.add(Value(op, call, output, shape, parents, weights, _window(op, args), sides), tensor)
        return result


def sides_of(boxes: Tensor, scale: float) -> tuple[float, float] | None:
    """Least and greatest side, the root of the area, of boxes (R, 5) or (R, 4), xyxy last, after scaling."""
    if not len(boxes):
        return None
    sides = (boxes[:, -2:] - boxes[:, -4:-2]).prod(dim=1).clamp(min=0).sqrt() * scale
    return float(sides.min()), float(sides.max())


def _window(op: str, args: Sequence[Any]) -> Window | None:
    """Reads the window off an operator's arguments, as aten's schemas order them."""
    if op == "convolution" and not args[6] and len(args[3]) == 2:  # args[6]: transposed
        return Window(_pair(args[1].shape[2:]), _pair(args[3]), _pair(args[4]), _pair(args[5]))
    if op in ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d"):
        stride = args[2] if len(args) > 2 and args[2] else args[1]
        padding = args[3] if len(args) > 3 else 0
        dilation = args[4] if len(args) > 4 and op != "avg_pool2d" else 1
        return Window(_pair(args[1]), _pair(stride), _pair(padding), _pair(dilation))
    if op == "constant_pad_nd" and len(args[1]) >= 4:  # as a window of one cell
        return Window((1, 1), (1, 1), (int(args[1][2]), int(args[1][0])), (1, 1))
    return None


def _tensors(func: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments, with numbers made tensors again where the operator takes tensors.

    Traced models compute sizes on tensors that stand for numbers; dispatch hands these over as plain numbers.
    """
    changed = list(args)
    for i in _tensor_positions(func):
        if i < len(args) and isinstance(args[i], int | float):
            changed[i] = torch.tensor(args[i])
    return changed


@cache
def _tensor_positions(func: Any) -> tuple[int, ...]:
    """Which of an operator's arguments are tensors; asked for at every step of a teacher."""
    return tuple(i for i, argument in enumerate(func._schema.arguments) if str(argument.type) == "Tensor")


def _pair(value: Any) -> tuple[int, int]:
    """2, [2] or [2, 3] as (y, x)."""
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values[0], values[-1]


class _SeenError(Exception):
    """Everything that was wanted has been read; the rest of the forward is not needed."""


@dataclass(frozen=True)
class Address:
    """Names a value from one forward to the next: an operator's output, as ``Value`` counts calls."""

    op: str
    call: int
    output: int = 0


@torch.no_grad()
def read(call: Callable[[], object], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
    """Reads values while ``call`` runs a model, and stops it when it has them.

    Args:
        call: runs the model.
        addresses: of the values.

    Returns:
        What the first convolution reads, (N, C, H, W), and the values.

    Raises:
        NoPyramidError: there is no convolution.
        ModelError: the forward ended without one of the values.
    """
    reader = _Reader(addresses)
    try:
        with reader:
            call()
    except (_SeenError, RuntimeError):
        # Our own stop, which TorchScript wraps into a RuntimeError; a model's own error leaves something unread.
        if reader.missing() or reader.network_input is None:
            raise
    if reader.network_input is None:
        raise NoPyramidError(NO_CONVOLUTION)
    missing = reader.missing()
    if missing:
        raise ModelError(f"the model's forward ended without {missing[0].op}:{missing[0].call}; its path has changed")
    return reader.network_input, [reader.found[address] for address in addresses]


class _Reader(TorchDispatchMode):
    def __init__(self, addresses: Sequence[Address]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._addresses = addresses
        self._calls_wanted = {(address.op, address.call) for address in addresses}
        self._calls: Counter[str] = Counter()
        self.network_input: Tensor | None = None
        self.found: dict[Address, Tensor] = {}

    def missing(self) -> list[Address]:
        return [address for address in self._addresses if address not in self.found]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = _NAMES.get(name := func.overloadpacket.__name__, name)
        if op == "convolution" and self.network_input is None:
            # A copy: a model may reuse its buffers.
            self.network_input = args[0].clone()
            self._calls.clear()
            if not self._addresses:
                raise _SeenError
        result = func(*_tensors(func, args), **(kwargs or {}))
        if self.network_input is not None:
            call = self._calls[op]
            self._calls[op] += 1
            if (op, call) in self._calls_wanted:
                tensors = tensors_in(result)
                for address in self._addresses:
                    if (address.op, address.call) == (op, call):
                        self.found[address] = tensors[address.output].clone()  # a later operator may write into it
                if not self.missing():
                    raise _SeenError
        return result
