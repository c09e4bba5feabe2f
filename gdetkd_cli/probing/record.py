"""Records what a model computes in one forward, operator by operator.

PyTorch's dispatcher reports the operators, so eager modules and TorchScript files (scripted or traced) give the same
record, and no module path is needed. A record describes values and does not keep them.
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

# These operators read a tensor's shape or type, but not its values.
_FRESH = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("new_", ""), ("", "_like"))
)
# Names of one operator: of traced models, and of devices. An address must hold on all of them.
_NAMES = {
    "_convolution": "convolution",
    **dict.fromkeys(
        (
            "native_batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
        ),
        "batch_norm",
    ),
}


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution or a pooling, (y, x) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@dataclass(frozen=True)
class Output:
    """A submodule's output, through which a value is read with its gradient: tensor ``leaf`` of ``of`` in a call."""

    module: str
    call: int
    leaf: int
    of: int = 1

    @property
    def name(self) -> str:
        """``neck.out3``; ``neck.0`` for the first of several tensors, ``neck:1`` for the second call."""
        element = self.module if self.of == 1 else f"{self.module}.{self.leaf}"
        return f"{element}:{self.call}" if self.call else element


@dataclass(frozen=True)
class Value:
    """A floating-point tensor returned by an operator.

    Attributes:
        op: the operator, for example ``convolution``.
        call: number of the operator's call. Counting restarts at 0 with the first convolution, because the calls before
            it depend on the number of images.
        output: index among the operator's outputs.
        parents: indices of the recorded values that the operator read.
        weights: names of the parameters and buffers that it read.
        window: of a convolution, pooling or padding.
        sides: of RoIAlign, the smallest and the largest side of its boxes, in cells of the map.
        name: in the model's file; empty if the file names only modules and operators.
        place: the innermost module that computed it, if the model's file says so; else empty.
        returned: the output of the innermost submodule that returned this value, or None.
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
    place: str = ""
    returned: Output | None = None
    result: bool = False

    @property
    def module(self) -> str:
        """The module that computed it, from its name in an ONNX file or its weights; empty if neither is known."""
        if self.name.startswith("/"):  # torch.onnx's names: /neck/out3/Conv_output_0
            return ".".join(self.name.split("/")[1:-1])
        known = bool(self.weights) and not self.weights[0].startswith("constant ")
        return self.weights[0].rpartition(".")[0] if known else ""


@dataclass(frozen=True)
class Record:
    """One forward.

    Attributes:
        values: floating-point values in the order of their computation; the inputs come first.
        results: for each tensor in the model's output, the index of its value, or None.
    """

    values: tuple[Value, ...]
    results: tuple[int | None, ...]
    returned: object


AddName = Callable[[str, object, str], None]  # (name in the model's file, value, its innermost module or "")


@torch.no_grad()
def record(
    call: Callable[[AddName], object],
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    submodules: Mapping[str, nn.Module] | None = None,
) -> Record:
    """Runs ``call`` once and records it.

    Args:
        call: runs the model on the inputs and returns its output; may call its argument to name values.
        weights: the model's parameters and buffers by name.
        submodules: by name, the submodules whose outputs are recorded.
    """
    recorder = _Recorder(weights)
    for tensor in inputs:
        recorder.add(Value("input", len(recorder.values), 0, tuple(tensor.shape), ()), tensor)
    hooks = [m.register_forward_hook(partial(recorder.add_output, name)) for name, m in (submodules or {}).items()]
    try:
        with recorder:
            result = call(recorder.add_name)
    finally:
        for hook in hooks:
            hook.remove()
    results = tuple(recorder.find_index(leaf) for leaf in list_tensors(result))
    values = []
    for i, value in enumerate(recorder.values):
        name, place = recorder.names.get(i, ("", ""))
        returned = recorder.outputs.get(i)
        values.append(replace(value, name=name, place=place, returned=returned, result=i in results))
    return Record(tuple(values), results, result)


def list_tensors(result: object) -> list[Tensor]:
    """Lists the tensors in the output of a model or submodule."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self._index: dict[int, int] = {}  # id of a living tensor -> its value
        # By address, since an operator may read a view of a parameter. Tensors without elements have no address.
        self._weights = {t.untyped_storage().data_ptr(): name for name, t in weights.items() if t.numel()}
        self._aliases: list[Tensor] = []  # kept alive, so that no other tensor gets their addresses
        self._calls: Counter[str] = Counter()
        self._module_calls: Counter[str] = Counter()
        self.outputs: dict[int, Output] = {}
        self.names: dict[int, tuple[str, str]] = {}  # (name, module)

    def add_name(self, name: str, result: object, module: str) -> None:
        """Names a value; further names of the same value are ignored."""
        index = self.find_index(result) if isinstance(result, Tensor) else None
        if index is not None:
            self.names.setdefault(index, (name, module))

    def add_output(self, name: str, module: nn.Module, inputs: object, result: object) -> None:
        """Records a submodule's output; a forward hook."""
        tensors = list_tensors(result)
        for leaf, tensor in enumerate(tensors):
            index = self.find_index(tensor)
            if index is not None:  # the innermost submodule returns first
                self.outputs.setdefault(index, Output(name, self._module_calls[name], leaf, len(tensors)))
        self._module_calls[name] += 1

    def add(self, value: Value, tensor: Tensor) -> None:
        key = id(tensor)
        if key not in self._index:
            weakref.finalize(tensor, self._index.pop, key, None)  # another tensor may get this id later
        self._index[key] = len(self.values)
        self.values.append(value)

    def find_index(self, tensor: Tensor) -> int | None:
        return self._index.get(id(tensor))

    def _name_weight(self, tensor: Tensor) -> str:
        """Returns a parameter's name. Other tensors are constants of the graph, such as a frozen model's weights."""
        pointer = tensor.untyped_storage().data_ptr()
        return self._weights.setdefault(pointer, f"constant {len(self._weights)}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        fresh = func.overloadpacket.__name__ in _FRESH
        parents = () if fresh else tuple(index for t in read if (index := self.find_index(t)) is not None)
        weights = tuple(self._name_weight(t) for t in read if self.find_index(t) is None and t.dim() and t.numel())
        op = _NAMES.get(name := func.overloadpacket.__name__, name)
        if op == "convolution" and op not in self._calls:
            self._calls.clear()
        call = self._calls[op]
        self._calls[op] += 1
        result = func(*_restore_tensors(func, args), **kwargs)
        if weights and not parents:  # a weight transposed, converted or scaled is that weight
            aliases = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
            self._weights.update((t.untyped_storage().data_ptr(), weights[0]) for t in aliases)
            self._aliases += aliases
            return result
        for output, tensor in enumerate(list_tensors(result)):
            if tensor.is_floating_point():
                shape = tuple(tensor.shape)
                sides = measure_sides(args[1], float(args[2])) if op == "roi_align" else None
                self.add(Value(op, call, output, shape, parents, weights, _read_window(op, args), sides), tensor)
        return result


def measure_sides(boxes: Tensor, scale: float) -> tuple[float, float] | None:
    """Returns the smallest and largest side (root of the area) of boxes (R, 4) xyxy or (R, 5) index, xyxy, scaled."""
    if not len(boxes):
        return None
    sides = (boxes[:, -2:] - boxes[:, -4:-2]).prod(dim=1).clamp(min=0).sqrt() * scale
    return float(sides.min()), float(sides.max())


def _read_window(op: str, args: Sequence[Any]) -> Window | None:
    """Reads the window from an operator's arguments, in the order of aten's schemas."""
    if op == "convolution" and not args[6] and len(args[3]) == 2:  # args[6]: transposed
        return Window(_to_pair(args[1].shape[2:]), _to_pair(args[3]), _to_pair(args[4]), _to_pair(args[5]))
    if op in ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d"):
        stride = args[2] if len(args) > 2 and args[2] else args[1]
        padding = args[3] if len(args) > 3 else 0
        dilation = args[4] if len(args) > 4 and op != "avg_pool2d" else 1
        return Window(_to_pair(args[1]), _to_pair(stride), _to_pair(padding), _to_pair(dilation))
    if op == "constant_pad_nd" and len(args[1]) >= 4:  # as a window of one cell
        return Window((1, 1), (1, 1), (int(args[1][2]), int(args[1][0])), (1, 1))
    return None


def _restore_tensors(func: Any, args: Sequence[Any]) -> list[Any]:
    """Converts numbers back to tensors where the operator takes tensors.

    Traced models compute sizes on zero-dimensional tensors, which the dispatcher passes on as plain numbers.
    """
    changed = list(args)
    for i in _find_tensor_positions(func):
        if i < len(args) and isinstance(args[i], int | float):
            changed[i] = torch.tensor(args[i])
    return changed


@cache
def _find_tensor_positions(func: Any) -> tuple[int, ...]:
    """Positions of an operator's tensor arguments; cached, because every step of a teacher needs them."""
    return tuple(i for i, argument in enumerate(func._schema.arguments) if str(argument.type) == "Tensor")


def _to_pair(value: Any) -> tuple[int, int]:
    """Converts 2, [2] or [2, 3] to (y, x)."""
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]
    return values[0], values[-1]


class ReadingDoneError(Exception):
    """Stops a forward once all requested values have been read."""


@dataclass(frozen=True)
class Address:
    """Identifies a value in every forward, by operator, call (counted as in ``Value``) and output."""

    op: str
    call: int
    output: int = 0


@torch.no_grad()
def read(call: Callable[[], object], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
    """Reads values while ``call`` runs a model, and stops the forward after the last one.

    Returns:
        The first convolution's input (N, C, H, W), and the values.

    Raises:
        NoPyramidError: there is no convolution.
        ModelError: the forward ended without one of the values.
    """
    reader = _Reader(addresses)
    try:
        with reader:
            call()
    except (ReadingDoneError, RuntimeError):
        # TorchScript wraps our own stop into a RuntimeError; after an error of the model, something is still unread.
        if reader.find_missing() or reader.network_input is None:
            raise
    if reader.network_input is None:
        raise NoPyramidError(NO_CONVOLUTION)
    missing = reader.find_missing()
    if missing:
        raise ModelError(
            f"the model's forward ended without {missing[0].op}:{missing[0].call}, which ran during probing; expected "
            "a model that runs the same operators for every image"
        )
    return reader.network_input, [reader.found[address] for address in addresses]


class _Reader(TorchDispatchMode):
    def __init__(self, addresses: Sequence[Address]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._addresses = addresses
        self._needed_calls = {(address.op, address.call) for address in addresses}
        self._calls: Counter[str] = Counter()
        self.network_input: Tensor | None = None
        self.found: dict[Address, Tensor] = {}

    def find_missing(self) -> list[Address]:
        return [address for address in self._addresses if address not in self.found]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = _NAMES.get(name := func.overloadpacket.__name__, name)
        if op == "convolution" and self.network_input is None:
            # A copy, because a model may reuse its buffers.
            self.network_input = args[0].clone()
            self._calls.clear()
            if not self._addresses:
                raise ReadingDoneError
        result = func(*_restore_tensors(func, args), **(kwargs or {}))
        if self.network_input is not None:
            call = self._calls[op]
            self._calls[op] += 1
            if (op, call) in self._needed_calls:
                tensors = list_tensors(result)
                for address in self._addresses:
                    if (address.op, address.call) == (op, call):
                        self.found[address] = tensors[address.output].clone()  # a later operator may write into it
                if not self.find_missing():
                    raise ReadingDoneError
        return result
