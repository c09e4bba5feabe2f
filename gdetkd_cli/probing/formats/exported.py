"""Reads programs written by ``torch.export.save`` without executing code from the file.

torch's reader unpickles objects, evaluates sizes as Python, writes names into Python code that it runs, imports
modules, loads compiled libraries and looks up any torch function that a node names. So the file is checked first and
refused if it contains more than operators, weights and plain names.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._export.verifier import SpecViolationError
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError, get_first_line
from gdetkd_cli.probing.formats.archive import Archive
from gdetkd_cli.probing.formats.declared import read_declared
from gdetkd_cli.probing.formats.operators import allows_target
from gdetkd_cli.probing.formats.runner import CALLS, ModuleRunner
from gdetkd_cli.probing.record import AddName
from gdetkd_cli.probing.second_inputs import KNOWN, SecondInput, describe_unknown

_READ_ERRORS = (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError, SyntaxError)
# What torch.export.save writes: no compiled libraries, no models under another ending.
_FILES = re.compile(
    r"archive_(format|version)|byteorder|version|\.data/\w+|models/\w+\.json|data/(weights|constants)/\w+(\.json|\.pt)?"
    r"|data/sample_inputs/\w+\.pt|extra/.*"
)
# Strings that torch keeps, prints or gives to an operator. All others become names in Python code.
_TEXTS = frozenset(
    {
        "as_string",
        "as_strings",
        "custom",
        "from_node",
        "guards_code",
        "nn_module_stack",
        "source_fn_stack",
        "stack_trace",
    }
    | {"torch_fn", "torch_version"}
)
_NAME = re.compile(r"[\w.+:/@ -]*")
_CONTAINERS = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.deque"}
)
_KEYS = re.compile(r"""[\w.,:/+\- "\[\]]*""")  # of a dictionary, as a JSON list
# Sizes are sympy expressions such as Mul(Integer(32), Symbol('s0', positive=True)).
_FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        """
        Abs Add And CeilDiv CeilToInt CleanDiv Eq Equality Float FloatPow FloatTrueDiv FloorDiv FloorToInt Ge
        GreaterThan Gt ITE Identity IntTrueDiv Integer IsNonOverlappingAndDenseIndicator LShift Le LessThan Lt Max Min
        Mod ModularIndexing Mul Ne Not Or Piecewise Pow PowByNatural PythonMod RShift Rational RoundDecimal RoundToInt
        StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat TruncToInt Unequality Where
        """,
    )
)
_SIZE = re.compile(r"([A-Za-z0-9_+\-*/(),<>=!&|~%. ]|'\w+')*", re.ASCII)
_SYMBOL = re.compile(r"[a-z]+\d+|(int_)?oo|true|false")
_ARITHMETIC = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def load_exported(path: Path) -> ModuleRunner:
    """Reads a ``.pt2`` file; its graph is called as it was exported.

    Raises:
        ModelError: the file is incomplete, needs pickled code, or does not take images.
        NoPyramidError: the program has no convolution.
    """
    _check_file(path)
    try:
        with _silence(), path.open("rb") as file:
            program = torch.export.load(file)
        # Guards are Python code from the file, so they are skipped; the operators check sizes themselves.
        _, named = program.call_spec.in_spec.children()
        module = _Program(program.module(check_guards=False), named.context or ())
    except (*_READ_ERRORS, SpecViolationError) as error:
        raise ModelError(
            f"torch {torch.__version__} cannot read the program in {path} ({get_first_line(error)})"
        ) from error
    if not any("conv" in str(node.target) for node in program.graph.nodes):
        raise NoPyramidError(NO_CONVOLUTION)
    return ModuleRunner(module, **_read_inputs(path, program))


@contextmanager
def _silence() -> Iterator[None]:
    """Suppresses torch's warnings and its log, which repeats the traceback of every error that it raises."""
    logger = logging.getLogger("torch.export")
    logger.disabled = True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.disabled = False


class _NamingInterpreter(Interpreter):
    """Runs a graph node by node and names each node's value."""

    def __init__(self, graph: GraphModule, add_name: AddName) -> None:
        super().__init__(graph)
        self._add_name = add_name

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self._add_name(n.name, result, _read_module(n))
        return result


def _read_module(node: Node) -> str:
    """Returns the innermost module that a node comes from, as a path; empty if the file has no plain path."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path if re.fullmatch(r"[\w.]+", path) else ""


class _Program(nn.Module):
    """An exported graph. It has one mode, so ``train`` and ``eval`` do nothing instead of raising."""

    def __init__(self, graph: GraphModule, named: Sequence[str]) -> None:
        """Takes a graph and the names of the arguments that are given by name, which are its last."""
        super().__init__()
        self.graph = graph
        self._named = named

    def forward(self, *arguments: object) -> object:
        count = len(arguments) - len(self._named)
        return self.graph(*arguments[:count], **dict(zip(self._named, arguments[count:], strict=True)))

    def run_with_names(self, arguments: Sequence[object], add_name: AddName) -> object:
        """Runs a forward and names the values of the graph's nodes."""
        return _NamingInterpreter(self.graph, add_name).run(*arguments)

    def train(self, mode: bool = True) -> Self:
        return self


def _read_inputs(path: Path, program: ExportedProgram) -> dict[str, Any]:
    """Returns ``ModuleRunner``'s arguments; raises a ModelError if the program takes no images, or more than them."""
    given = set(program.graph_signature.user_inputs)
    inputs = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in given}
    images = {name: value for name, value in inputs.items() if name not in KNOWN or not isinstance(value, Tensor)}
    shapes = [tuple(value.shape) for value in images.values() if isinstance(value, Tensor)]
    if len(images) > 1 and shapes and len(shapes[0]) in (3, 4):
        raise ModelError(describe_unknown(path, list(images)[1:]))
    if len(shapes) != 1 or len(shapes[0]) not in (3, 4):
        raise ModelError(
            f"{path} was exported with inputs of shapes {', '.join(str(list(s)) for s in shapes) or 'none'}; expected "
            "one (N, 3, H, W) tensor or one (3, H, W) image; export the model with such an example"
        )
    (image,) = images.values()
    declared = read_declared(path, shapes[0], image.dtype)
    calls = [declared.call]
    if len(shapes[0]) == 3:
        # torch.export flattens a list of one image into one input, but the program takes it as a list.
        calls.append(replace(declared.call, name=CALLS[0].name, arrange=CALLS[0].arrange))
    return {
        "calls": calls,
        "size": declared.size,
        "grey": declared.grey,
        "inputs": [
            SecondInput.declare(name, value.dtype, value.shape) if name in KNOWN else None
            for name, value in inputs.items()
        ],
    }


def _check_file(path: Path) -> None:
    """Raises a ModelError if the file is incomplete, or would execute code when it is read or run."""
    archive = Archive(path)
    for name in archive.names:
        if not _FILES.fullmatch(name):
            raise _refusal(path, f"it contains {name[:60]!r}")
        if name.endswith(".pt"):
            _check_pickle(path, archive.read(name))
        elif name.endswith(".json") and not name.startswith("extra/"):
            try:
                _check_json(path, name, json.loads(archive.read(name)))
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ModelError(f"{path} is damaged: {name} is not a program ({get_first_line(error)})") from error


def _check_pickle(path: Path, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise _refusal(path, "its example inputs or weights") from error


def _check_json(path: Path, name: str, content: object) -> None:
    stack: list[tuple[str, object]] = [("", content)]
    while stack:
        key, entry = stack.pop()
        if isinstance(entry, dict):
            stack.extend(entry.items())
            stack.extend(("", key) for key in entry)
        elif isinstance(entry, list):
            stack.extend((key, value) for value in entry)
        elif (fault := _find_fault(key, entry)) is not None:
            raise _refusal(path, f"in {name}, {fault}")


def _find_fault(key: str, value: object) -> str | None:
    """Returns why torch would do more with a value of the JSON than compute; None if it would not."""
    text = value if isinstance(value, str) else ""
    match key:
        case "use_pickle":
            return "a weight is pickled" if value else None
        case "path_name":
            return None if re.fullmatch(r"(weight|tensor)_\w+", text) else f"a weight is {text[:60]!r}"
        case "target" | "as_operator":
            return None if allows_target(text) else f"a node calls {text[:60]}"
        case "expr_str":
            return None if _is_arithmetic(text) else f"a size is {text[:60]!r}"
        case "in_spec" | "out_spec":
            return None if _is_plain(json.loads(text)[1]) else f"arguments are {text[:60]!r}"
        case "name" | "as_name" | "forward_arg_names":
            return None if text.isidentifier() or not text else f"a value is named {text[:60]!r}"
    if not key and _is_arithmetic(text):  # a key, such as the size that a range belongs to
        return None
    return None if key in _TEXTS or _NAME.fullmatch(text) else f"a name is {text[:60]!r}"


def _is_plain(spec: Any) -> bool:
    """Whether arguments are tensors in plain containers; torch imports the modules of others."""
    return (
        spec["type"] in _CONTAINERS
        and bool(_KEYS.fullmatch(spec["context"] or ""))
        and all(map(_is_plain, spec["children_spec"]))
    )


def _is_arithmetic(expression: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, MemoryError):  # the second: too many brackets
        return False
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    called = [getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)]
    return (
        bool(_SIZE.fullmatch(expression))
        and all(isinstance(node, _ARITHMETIC) for node in nodes)
        and all(name in _FUNCTIONS or _SYMBOL.fullmatch(name) for name in names)
        and all(name in _FUNCTIONS for name in called)
    )


def _refusal(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} cannot be read without executing code from it ({reason}), which gdetkd never does; use ONNX"
    )
