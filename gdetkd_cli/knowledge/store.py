"""Stores of named groups of tensors: in memory, or as one safetensors file each in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gdetkd_cli.errors import DiskError, KnowledgeError, get_first_line
from gdetkd_cli.files import write_file

Tensors = dict[str, Tensor]
Tell = Callable[[str], None]  # receives a note for the user

_RECOUNT = 256  # writes between two counts of a folder, into which other processes write too
_SUFFIX = ".safetensors"


class Store(Protocol):
    """Named groups of tensors on the host.

    Attributes:
        used: bytes stored.
    """

    used: int

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensors | None:
        """Returns a group; None if there is none of this name."""

    def add(self, name: str, tensors: Tensors) -> None:
        """Keeps a group, unless the store is full."""


class MemoryStore:
    """Groups in this process's memory.

    Args:
        most: bytes to keep at most.
        tell: receives one note when the store is full.
    """

    def __init__(self, most: int, tell: Tell) -> None:
        self.used = 0
        self._most, self._tell = most, tell
        self._groups: dict[str, Tensors] = {}
        self._full = False

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def read(self, name: str) -> Tensors | None:
        return self._groups.get(name)

    def add(self, name: str, tensors: Tensors) -> None:
        size = count_bytes(tensors)
        if self._full or self.used + size > self._most:
            if not self._full:
                self._tell(describe_quota("the memory for the teacher's features", self._most))
            self._full = True
            return
        self._groups[name] = tensors
        self.used += size


class DiskStore:
    """Groups as files of a folder, which any number of processes may read and write. Reading maps the files.

    A group is written whole under a name of this process's own, then renamed, so a kill or a full disk leaves either
    the whole group or nothing.

    Args:
        folder: the files' folder, made when the first group is written.
        most: bytes to keep at most, with those of other processes; None: no limit.
        tell: receives one note when the quota or the disk is full.
    """

    def __init__(self, folder: Path, most: int | None, tell: Tell) -> None:
        self._folder = folder
        self.most, self._tell = most, tell
        self._full = False
        self._added = 0
        self.used = sum(path.stat().st_size for path in self.list_files())

    def list_files(self) -> Iterator[Path]:
        """Lists the files of complete groups."""
        return self._folder.glob(f"*/*{_SUFFIX}")

    def __contains__(self, name: str) -> bool:
        return self._locate(name).exists()

    def read(self, name: str) -> Tensors | None:
        path = self._locate(name)
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            raise KnowledgeError(
                f"{path} is damaged ({get_first_line(error)}); remove it, then run the command again"
            ) from error

    def add(self, name: str, tensors: Tensors) -> None:
        if self._full:
            return
        # safetensors does not write the strides of channels last.
        content = save({key: value.contiguous() for key, value in tensors.items()})
        self._added += 1
        if self._added % _RECOUNT == 0:
            self.used = sum(path.stat().st_size for path in self.list_files())
        if self.most is not None and self.used + len(content) > self.most:
            self._stop(describe_quota(str(self._folder), self.most))
            return
        path = self._locate(name)
        fresh = path.with_name(f"{name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(fresh, lambda file: file.write(content), size=len(content))
            os.replace(fresh, path)
        except DiskError as error:
            if self.most is None:
                raise
            self._stop(f"{error}; until then, the teacher runs for the images that are not stored")
            return
        self.used += len(content)

    def _stop(self, note: str) -> None:
        self._full = True
        self._tell(note)

    def _locate(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}{_SUFFIX}"


def count_bytes(tensors: Tensors) -> int:
    """Counts the bytes of a group."""
    return sum(value.nbytes for value in tensors.values())


def describe_quota(where: str, most: int) -> str:
    """Describes a store that has reached its quota."""
    return (
        f"{where} has reached {most / 1e9:.3g} GB (distill.teacher_cache_gb); the teacher runs for the images that are "
        "not stored"
    )
