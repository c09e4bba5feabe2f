"""Reads programs written by ``torch.export.save`` without executing code from the file.

torch's reader unpickles objects, evaluates sizes as Python and looks up any torch function that a node names. So the
file is checked first and refused if it contains more than operators and weights.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError, first_line
from gdetkd_cli.probing.formats.operators import allows_target
from gdetkd_cli.probing.formats.runner import CALLS, ModuleRunner
from gdetkd_cli.probing.inputs import Call, stack_images, with_channels_last
from gdetkd_cli.probing.record import AddName

# Sizes are sympy expressions such as Mul(Integer(32), Symbol('s0', positive=True)). Allowed are quoted names and calls
# of classes (capitalised); attributes, other strings and Python's functions are not.
_EXPRESSION = re.compile(r"([A-Za-z0-9_+\-*/(),<>=!&|~%. ]|'\w+')*")
_UNSAFE = re.compile(r"__|[A-Za-z_)']\s*\.|\b[a-z_]\w*\s*\(|\)\s*\(")


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
        module = _Program(program.module(check_guards=False))
    except (RuntimeError, ValueError, LookupError, AssertionError, TypeError) as error:
        raise ModelError(
            f"torch {torch.__version__} cannot read the program in {path} ({first_line(error)})"
        ) from error
    if not any("conv" in str(node.target) for node in program.graph.nodes):
        raise NoPyramidError(NO_CONVOLUTION)
    inputs = [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    shapes = [tuple(value.shape) for value in inputs if isinstance(value, Tensor)]
    if len(shapes) != 1 or len(inputs) != 1 or len(shapes[0]) not in (3, 4):
        raise ModelError(
            f"{path} was exported with inputs of shapes {', '.join(str(list(s)) for s in shapes) or 'none'}; expected "
            "one (N, 3, H, W) tensor or one (3, H, W) image; export the model with such an example"
        )
    return ModuleRunner(module, **_read_convention(path, shapes[0]))


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
        self._add_name(n.name, result)
        return result


class _Program(nn.Module):
    """An exported graph. It has one mode, so ``train`` and ``eval`` do nothing instead of raising."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: object) -> object:
        return self.graph(images)

    def run_with_names(self, argument: object, add_name: AddName) -> object:
        """Runs a forward and names the values of the graph's nodes."""
        return _NamingInterpreter(self.graph, add_name).run(argument)

    def train(self, mode: bool = True) -> Self:
        return self


def _read_convention(path: Path, shape: tuple[Any, ...]) -> dict[str, Any]:
    """Returns ``ModuleRunner``'s calls and size, from the shape of the program's input."""
    last = shape[-1] == 3 and shape[-3] != 3
    sides = shape[-3:-1] if last else shape[-2:]
    size = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) for side in sides) else None
    listed, batch, single = CALLS
    if len(shape) == 3:
        # torch.export flattens a list of one image into one input, but the program takes it as a list.
        calls = [single, Call(listed.name, "one", listed.argument)]
    elif not isinstance(shape[0], int):
        calls = [Call(batch.name, "one size", stack_images)]
    elif shape[0] == 1:
        calls = [Call("(1, 3, H, W) tensor", "one", stack_images)]
    else:
        raise ModelError(f"{path} takes batches of {shape[0]} images; export it for 1 image or for any number")
    return {"calls": [with_channels_last(call) for call in calls] if last else calls, "size": size}


def _check_file(path: Path) -> None:
    """Raises a ModelError if the file is incomplete, or would execute code when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    _check_json(path, name, json.loads(archive.read(name)))
                elif "/sample_inputs/" in name or name.endswith(".pt"):
                    _check_pickle(path, archive.read(name))
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ModelError(
            f"{path} is not a complete file of torch.export.save ({first_line(error)}); export it again"
        ) from error


def _check_pickle(path: Path, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise _refusal(path, "its example inputs or weights") from error


def _check_json(path: Path, name: str, content: Any) -> None:
    stack = [content]
    while stack:
        entry = stack.pop()
        if isinstance(entry, dict):
            if entry.get("use_pickle"):
                raise _refusal(path, f"{name} uses pickle")
            kind = str(entry.get("path_name", "weight_")).partition("_")[0]
            if kind not in ("weight", "tensor"):
                raise _refusal(path, f"{name} names {entry['path_name']}")
            expression = entry.get("expr_str")
            if isinstance(expression, str) and not _is_harmless(expression):
                raise _refusal(path, f"a size is {expression[:60]!r}")
            target = entry.get("target")
            if isinstance(target, str) and "inputs" in entry and not allows_target(target):
                raise _refusal(path, f"a node calls {target[:60]}")
            stack.extend(entry.values())
        elif isinstance(entry, list):
            stack.extend(entry)


def _is_harmless(expression: str) -> bool:
    return bool(_EXPRESSION.fullmatch(expression)) and not _UNSAFE.search(expression)


def _refusal(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} cannot be read without executing code from it ({reason}), which gdetkd never does; use ONNX"
    )
