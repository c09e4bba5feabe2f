"""Reads JSON annotations, and the kinds of values that they must have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypeGuard

from gdetkd_cli.errors import DataError
from gdetkd_cli.files import name_kind

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(file: Path, kind: str) -> object:
    """Reads a file of annotations.

    Args:
        kind: what it should be, for messages.

    Raises:
        DataError: the file does not exist, or is not JSON in UTF-8.
    """
    if not file.is_file():
        raise DataError(f"there is no annotation file {file}{name_kind(file)}; give the path of {kind}")
    content = file.read_bytes()
    if content.startswith(_LFS_POINTER):
        raise DataError(f"{file} is a git-LFS pointer, not the annotations; run `git lfs pull` where it came from")
    try:
        return json.loads(content)
    except ValueError as error:  # also of text that is not Unicode
        raise DataError(f"{file} should be {kind}, but it is not JSON ({error}); give another file") from error
    except RecursionError as error:
        raise DataError(f"{file} should be {kind}, but it is nested without end; give another file") from error


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; true and false are no numbers."""
    if type(value) is float:  # most values, quickly
        return math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number that 64 bits can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that UTF-8 can hold; JSON can contain half a character."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()
