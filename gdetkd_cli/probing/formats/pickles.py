"""Checks the pickles in a TorchScript file: torch takes the sizes in them on trust, whatever the file holds."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.probing.formats.archive import Archive


class _Nothing(dict[Any, Any]):
    """Stands for every object of a pickle."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None: ...


class _Reader(pickle.Unpickler):
    """Reads a pickle without creating or calling anything that it names, and checks the storages in it."""

    def __init__(self, content: bytes, archive: Archive, folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> type:
        if "sparse" in name:  # torch does not check the indices
            raise pickle.UnpicklingError(f"it holds a sparse tensor, {module}.{name}")
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> object:
        _, kind, key, _, count = pid
        size = count * getattr(torch, kind.__name__).dtype.itemsize
        if size != 0 and not 0 < size <= len(self._archive.read(f"{self._folder}/{key}")):  # an empty one has no file
            raise pickle.UnpicklingError(f"storage {key} has fewer than the {size} bytes that {self._folder} states")
        return _Nothing()


def check_pickle(path: Path, name: str, archive: Archive) -> None:
    """Refuses a pickle with tensors that reach beyond their storage's bytes.

    Raises:
        ModelError: it holds such a tensor, or cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # torch deprecates the classes of typed storages
            _Reader(archive.read(name), archive, name.rpartition(".")[0]).load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {name} cannot be read ({get_first_line(error)})") from error
