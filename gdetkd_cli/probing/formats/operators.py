"""Which operators a model file may call: those that compute, and touch nothing but tensors.

TorchScript and exported programs are programs. Reading a TorchScript file can already run parts of it, so its code is
checked as text before it is loaded. An operator is allowed by its signature: it belongs to a namespace of operators
that compute, and takes no string, through which alone it could name a file; or it is on the list of operators whose
string is a mode, a text or a message. Operators of sparse tensors are refused, because torch does not check their
indices: they write outside a tensor's memory.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torchvision  # noqa: F401  # registers its operators

from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.probing.formats.archive import Archive
from gdetkd_cli.probing.formats.pickles import check_pickle
from gdetkd_cli.trust import is_code_trusted

_NAMESPACES = frozenset({"aten", "prim", "prims", "torchvision", "quantized", "_quantized"})
_CLASSES = frozenset({"quantized", "rnn"})  # of torch.classes: packed weights
_REFUSED = frozenset(
    f"prim::{name}" for name in ("rpc_async", "rpc_remote", "rpc_sync", "PythonOp", "IgnoredPythonOp", "Print")
)
_UNCHECKED = re.compile(r"(?<!is_)sparse|nested_view")
# Their strings are modes, texts and messages.
_STRINGS = frozenset(
    re.findall(
        r"\w+",
        """
        Delete Float Int __contains__ __getitem__ __interpolate __upsample _assert_async _assert_scalar
        _convolution_mode _functional_assert_async _functional_assert_scalar _linalg_check_errors _linalg_eigh
        _linalg_svd _set_item add any capitalize center clear conv1d conv2d conv3d copy count device dict div
        div_ divide divide_ einsum endswith eq expandtabs fft_fft fft_fft2 fft_fftn fft_hfft fft_hfft2 fft_hfftn
        fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft
        fft_rfft2 fft_rfftn
        find format ge gelu gelu_ gelu_backward get get_autocast_dtype gt index index_reduce index_reduce_ isalnum
        isalpha isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper items join keys le
        len linalg_cond linalg_eigh linalg_eigvalsh linalg_lstsq linalg_matrix_norm linalg_norm linalg_qr linalg_svd
        linalg_svdvals list ljust lower lstrip lt meshgrid nanquantile ne ord pad pad_sequence partition percentFormat
        pop popitem quantile remove replace rfind rindex rjust rpartition rsplit rstrip scatter scatter_ scatter_reduce
        scatter_reduce_ searchsorted segment_reduce setdefault slice sort sorted split splitlines startswith stft strip
        swapcase title update upper values warn zfill
        """,
    )
)
_HIGHER_ORDER = frozenset(
    {"cond", "while_loop", "scan", "map_impl", "wrap_with_autocast", "wrap_with_set_grad_enabled"}
)
_PYTHON_OPERATORS = frozenset(
    re.findall(
        r"\w+",
        "abs add and_ eq floordiv ge getitem gt index invert le lshift lt mod mul ne neg not_ or_ pos pow rshift sub "
        "truediv xor",
    )
)
_SPECIAL_FORMS = frozenset({"tuple", "list", "dict"})  # what ``torch.`` may name beside operators


def allows_operator(namespace: str, name: str) -> bool:
    """Whether an operator only computes, in every overload."""
    return f"{namespace}::{name}" in _computing()


def allows_target(target: str) -> bool:
    """Whether an exported program's node may call ``target``, as ``torch.ops.aten.add.Tensor``."""
    kind, _, rest = target.partition(".")
    if kind == "math":
        return rest.isidentifier() and not rest.startswith("_")
    if kind == "_operator":
        return rest in _PYTHON_OPERATORS
    if target.startswith("torch.sym_"):
        return rest.isidentifier()
    match target.split("."):
        case ["torch", "ops", "higher_order", name]:
            return name in _HIGHER_ORDER
        case ["torch", "ops", namespace, name, overload] if allows_operator(namespace, name):
            return overload in getattr(getattr(torch.ops, namespace), name).overloads()  # no other attribute
    return False


def check_torchscript(path: Path) -> None:
    """Refuses a TorchScript file that calls anything but operators that compute, unless the user trusts its code.

    Raises:
        ModelError: it calls others, or its code cannot be read.
    """
    if is_code_trusted():
        return
    archive, refused = Archive(path), set[str]()
    if "model.json" in map(str.casefold, archive.names):  # may keep code under any name
        raise ModelError(f"{path} has TorchScript's format of before 2019; save it anew with a current torch")
    for name in archive.names:
        ending = name.casefold().rpartition(".")[2]
        if ending == "py":
            try:
                refused |= set(_refused_in(archive.read(name).decode()))
            except (tokenize.TokenError, SyntaxError, ValueError, TypeError) as error:
                raise ModelError(f"{path}: its code cannot be checked ({get_first_line(error)})") from error
        elif name.casefold() in ("constants.pkl", "data.pkl"):
            check_pickle(path, name, archive)
            classes = re.findall(rb"torch\.classes\.(\w+)", archive.read(name))
            refused |= {f"torch.classes.{found.decode()}" for found in classes if found.decode() not in _CLASSES}
    if refused:
        raise ModelError(
            f"{path} calls {', '.join(sorted(refused))}, which can do more than compute; if you trust the file, add "
            "--trust-code"
        )


@cache
def _computing() -> frozenset[str]:
    """Operators of which every overload only computes."""
    good: set[str] = set()
    bad = set(_REFUSED)
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        takes_text = any("str" in str(argument.type) for argument in schema.arguments)
        harmless = not takes_text or (namespace == "aten" and name in _STRINGS) or schema.name == "prim::RaiseException"
        computes = namespace in _NAMESPACES and harmless and not _UNCHECKED.search(name)
        (good if computes else bad).add(schema.name)
    return frozenset(good - bad)


@cache
def _other_aten() -> frozenset[str]:
    """Names of aten's operators that can do more than compute."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    return frozenset(name.removeprefix("aten::") for name in names - _computing() if name.startswith("aten::"))


def _refused_in(source: str) -> Iterator[str]:
    """What a piece of TorchScript calls, or could call under another name, that is not allowed."""
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.STRING, tokenize.ERRORTOKEN)
    ]
    if any(token.type == tokenize.ERRORTOKEN for token in tokens):  # torch may read on differently
        raise ValueError("a character that is no part of Python")
    texts = [token.string for token in tokens] + ["", ""]
    name = ""  # of neighbouring strings, which are one: getattr takes a name as a string
    for at, token in enumerate(tokens):
        name = name + ast.literal_eval(token.string) if token.type == tokenize.STRING else ""
        # A call of this name may be a method of any value, which aten's operators are as well.
        called = texts[at] if texts[at + 1] == "(" else name
        if called in _other_aten():
            yield f"aten::{called}"
        if token.type == tokenize.NAME and texts[at - 1] != ".":
            yield from _refused_chain(_chain(texts, at))


def _chain(texts: list[str], at: int) -> list[str]:
    """``["torch", "conv2d", "("]``: names that dots join, and what follows them."""
    names = [texts[at]]
    at += 1
    while texts[at] == "." and texts[at + 1].isidentifier():
        names.append(texts[at + 1])
        at += 2
    return [*names, texts[at]]


def _refused_chain(chain: list[str]) -> Iterator[str]:
    match chain:
        case ["torch", name, _] if name not in _SPECIAL_FORMS and not allows_operator("aten", name):
            yield f"aten::{name}"
        case ["torch", _, _]:
            return
        case ["torch", *_]:  # the name alone could be given another
            yield "torch"
        case ["ops", namespace, name, _]:
            if not allows_operator(namespace, name):
                yield f"{namespace}::{name}"
        case ["ops", *_]:
            yield "ops"
        case ["print", _]:
            yield "prim::Print"
        case ["__torch__", _] | ["__torch__", "torch", _]:
            yield "__torch__"
        case ["__torch__", "torch", "classes", namespace, *_] if namespace not in _CLASSES:
            yield f"torch.classes.{namespace}"
