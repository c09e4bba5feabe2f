"""Reading programs that ``torch.export.save`` wrote, without executing anything in them.

torch's own reader unpickles what the file asks it to, hands sizes to a parser that evaluates Python, and looks up
whatever function of torch a node names. So the file is looked through first, and refused if it wants more than
operators.
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
from gdetkd_cli.probing.inputs import Call, channels_last, stacked
from gdetkd_cli.probing.record import Tell

# Sizes are sympy expressions, as in Mul(Integer(32), Symbol('s0', positive=True)): names in quotes, and calls of
# classes, which begin with a capital; no attributes, no other strings, no functions of Python's.
_EXPRESSION = re.compile(r"([A-Za-z0-9_+\-*/(),<>=!&|~%. ]|'\w+')*")
_UNSAFE = re.compile(r"__|[A-Za-z_)']\s*\.|\b[a-z_]\w*\s*\(|\)\s*\(")


def load_exported(path: Path) -> ModuleRunner:
    """Reads a ``.pt2`` file; its graph is called as it was exported.

    Raises:
        ModelError: not a whole file, or one that needs pickled code.
        NoPyramidError: nothing in it could be a feature map.
    """
    _check(path)
    try:
        with _silence(), path.open("rb") as file:
            program = torch.export.load(file)
        # Guards are Python in the file; sizes are checked without them.
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
            f"{path} was exported with inputs of shapes {', '.join(str(list(s)) for s in shapes) or 'none'}; one "
            "(N, 3, H, W) tensor or one (3, H, W) image was expected"
        )
    return ModuleRunner(module, **_convention(path, shapes[0]))


@contextmanager
def _silence() -> Iterator[None]:
    """torch logs a traceback of what it raises as well."""
    logger = logging.getLogger("torch.export")
    logger.disabled = True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.disabled = False


class _Telling(Interpreter):
    """Runs a graph node by node, and tells each node's name and value."""

    def __init__(self, graph: GraphModule, tell: Tell) -> None:
        super().__init__(graph)
        self._tell = tell

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self._tell(n.name, result)
        return result


class _Program(nn.Module):
    """An exported graph; it has one mode, and refuses to be asked for another."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: object) -> object:
        return self.graph(images)

    def run_told(self, argument: object, tell: Tell) -> object:
        """A forward that tells the names of the graph's nodes."""
        return _Telling(self.graph, tell).run(argument)

    def train(self, mode: bool = True) -> Self:
        return self


def _convention(path: Path, shape: tuple[Any, ...]) -> dict[str, Any]:
    last = shape[-1] == 3 and shape[-3] != 3
    sides = shape[-3:-1] if last else shape[-2:]
    size = (int(sides[0]), int(sides[1])) if all(isinstance(side, int) for side in sides) else None
    listed, batch, single = CALLS
    if len(shape) == 3:
        # torch.export flattens a list of one image into one input, and takes it back as a list.
        calls = [single, Call(listed.name, "one", listed.argument)]
    elif not isinstance(shape[0], int):
        calls = [Call(batch.name, "one size", stacked)]
    elif shape[0] == 1:
        calls = [Call("(1, 3, H, W) tensor", "one", stacked)]
    else:
        raise ModelError(f"{path} takes {shape[0]} images at once; one made for 1, or for any number, was expected")
    return {"calls": [channels_last(call) for call in calls] if last else calls, "size": size}


def _check(path: Path) -> None:
    """Refuses what would execute code when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    _check_json(path, name, json.loads(archive.read(name)))
                elif "/sample_inputs/" in name or name.endswith(".pt"):
                    _check_pickle(path, archive.read(name))
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ModelError(f"{path} is not a whole file written by torch.export.save ({first_line(error)})") from error


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
                raise _refusal(path, f"{name} asks for it")
            kind = str(entry.get("path_name", "weight_")).partition("_")[0]
            if kind not in ("weight", "tensor"):
                raise _refusal(path, f"{name} names {entry['path_name']}")
            expression = entry.get("expr_str")
            if isinstance(expression, str) and not _is_harmless(expression):
                raise _refusal(path, f"a size reads {expression[:60]!r}")
            target = entry.get("target")
            if isinstance(target, str) and "inputs" in entry and not allows_target(target):
                raise _refusal(path, f"a node calls {target[:60]}")
            stack.extend(entry.values())
        elif isinstance(entry, list):
            stack.extend(entry)


def _is_harmless(expression: str) -> bool:
    return bool(_EXPRESSION.fullmatch(expression)) and not _UNSAFE.search(expression)


def _refusal(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} cannot be read without executing code from it ({reason}), which gdetkd never does")
