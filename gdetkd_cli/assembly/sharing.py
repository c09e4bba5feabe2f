"""Reads data once per machine. The other processes of a run map the arrays that the first one wrote to a file.

The annotations of a large data set take minutes and gigabytes to parse, and their arrays hundreds of megabytes to keep.
"""

from __future__ import annotations

import mmap
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from gdetkd_cli.errors import DataError, GDetKDError

Value = TypeVar("Value")
_ALIGNMENT = 64  # bytes, as numpy aligns its own arrays


@dataclass(frozen=True)
class _Shared:
    """A value whose arrays lie in a file.

    Attributes:
        sizes: bytes of each array, in the order of the file.
        rest: the value without its arrays, pickled; it travels between processes only, never through a file.
    """

    path: Path
    sizes: tuple[int, ...]
    rest: bytes


def read_once(read: Callable[[], Value], accelerator: Accelerator) -> Value:
    """Calls ``read`` in one process per machine, and returns its result in all of them.

    Args:
        read: reads data; its result can be pickled.
        accelerator: of the run; all its processes must call this function.

    Raises:
        GDetKDError: of ``read``; in the other processes a DataError.
    """
    if accelerator.num_processes == 1:
        return read()
    with ExitStack() as stack:
        value: Value | None = None
        shared, error = None, None
        if accelerator.is_local_main_process:
            try:
                value = read()
                shared = _write(value, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gdetkd-"))))
            except GDetKDError as found:
                error = found
        sent: list[_Shared | None] = gather_object([shared])
        if error is not None:
            raise error
        if not accelerator.is_local_main_process:
            own = sent[accelerator.process_index - accelerator.local_process_index]
            if own is None:
                raise DataError("another process of this machine cannot read the data; its message gives the reason")
            value = pickle.loads(own.rest, buffers=list(_list_arrays(own)))  # noqa: S301 - from a process of this run
        accelerator.wait_for_everyone()  # the file may go now: what is mapped stays readable
    assert value is not None
    return value


def _write(value: object, folder: Path) -> _Shared:
    arrays: list[pickle.PickleBuffer] = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    path, sizes = folder / "arrays", []
    with path.open("wb") as file:
        for array in arrays:
            raw = array.raw()
            file.write(raw)
            file.write(bytes(-raw.nbytes % _ALIGNMENT))
            sizes.append(raw.nbytes)
    return _Shared(path, tuple(sizes), rest)


def _list_arrays(shared: _Shared) -> Iterator[memoryview]:
    if not any(shared.sizes):
        yield from (memoryview(b"") for _ in shared.sizes)
        return
    with shared.path.open("rb") as file:
        # A private mapping: arrays are writable, and what is written stays in this process.
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    start = 0
    for size in shared.sizes:
        yield whole[start : start + size]
        start += size + -size % _ALIGNMENT
