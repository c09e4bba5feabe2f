"""Detectors of the user's own code: ``package.module:function``, imported and called with the user's consent."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from gdetkd_cli.errors import ModelError
from gdetkd_cli.trust import code_is_trusted

_DETECTOR = (
    "module",
    "levels",
    "forward_train",
    "extract_features",
    "region_outputs",
    "predict",
)  # of ``protocol.Detector``


def is_reference(text: str) -> bool:
    """Whether ``text`` reads as ``package.module:function``."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def make(reference: str, arguments: Mapping[str, Any]) -> Any:
    """The module, or the ``Detector``, that the function returns.

    Modules in the current folder are found as well as installed ones.

    Args:
        reference: ``package.module:function``.
        arguments: keyword arguments of the call.

    Raises:
        ModelError: without consent; there is no such function; it failed, or returned something else.
    """
    if not is_reference(reference):
        raise ModelError(f"{reference!r} does not name a function; expected package.module:function")
    if not code_is_trusted():
        raise ModelError(
            f"{reference} is Python code, which runs with your consent only; if you trust it: --trust-code"
        )
    module_name, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not look there by itself
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ModelError(f"{reference}: there is no module {error.name!r} in this folder or environment") from error
    except AttributeError as error:
        raise ModelError(f"{reference}: {error}") from error
    try:
        made = function(**arguments)
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"{reference} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module) and not all(hasattr(made, name) for name in _DETECTOR):
        raise ModelError(
            f"{reference} returned {type(made).__name__}; a torch.nn.Module was expected, or gdetkd's Detector"
        )
    return made
