"""Detectors from the user's own code: ``package.module:function``, called only with the user's consent."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from gdetkd_cli.errors import ModelError
from gdetkd_cli.trust import is_code_trusted

# Required members of ``protocol.Detector``.
_DETECTOR = ("module", "levels", "forward_train", "extract_features", "region_outputs", "predict")


def is_reference(text: str) -> bool:
    """Whether ``text`` reads as ``package.module:function``."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def make(reference: str, arguments: Mapping[str, Any]) -> Any:
    """Calls the function, which returns a module or a ``Detector``.

    The function's module is installed or lies in the current folder.

    Args:
        reference: ``package.module:function``.

    Raises:
        ModelError: the user did not consent, the function does not exist, it failed, or it returned something else.
    """
    if not is_reference(reference):
        raise ModelError(f"{reference!r} is not the name of a function; expected package.module:function")
    if not is_code_trusted():
        raise ModelError(
            f"{reference} is Python code and runs only with your consent; if you trust it, add --trust-code"
        )
    module_name, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not search it by itself
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise ModelError(f"{reference}: no module named {error.name!r} is installed or in this folder") from error
    except AttributeError as error:
        raise ModelError(f"{reference}: {error}") from error
    try:
        detector = function(**arguments)
    except Exception as error:  # the user's own code may raise anything
        raise ModelError(f"{reference} failed: {type(error).__name__}: {error}") from error
    if not isinstance(detector, nn.Module) and not all(hasattr(detector, name) for name in _DETECTOR):
        raise ModelError(
            f"{reference} returned {type(detector).__name__}; expected a torch.nn.Module or gdetkd's Detector"
        )
    return detector
