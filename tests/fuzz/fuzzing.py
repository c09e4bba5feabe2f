"""Runs inputs by their numbers and names what became of each.

An input is made from (seed, target, number) alone. A target whose input can end the interpreter runs in a child process
with a limit of memory.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MEMORY = 8 * 2**30  # bytes of private memory of a child process
_SECONDS = 30  # of the processor, for one input; other work on the machine does not count
_PATIENCE = 240  # seconds until a child process that waits is ended
FAILURES = ("internal error", "hang", "crash", "silent")


class AcceptedSilentlyError(Exception):
    """An input was accepted that must be refused or named in a note."""


class HangError(BaseException):
    """An input took too long."""


@dataclass(frozen=True)
class Target:
    """A format to fuzz.

    Attributes:
        name: of the target.
        count: the usual number of inputs.
        prepare: makes the valid files that the inputs start from, in a folder.
        run: makes one input in the folder and gives it to the tool. Returns when the tool accepts it.
        isolated: whether an input could end the interpreter.
    """

    name: str
    count: int
    prepare: Callable[[Path], Any]
    run: Callable[[random.Random, Path, Any], None]
    isolated: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an input: accepted, refused, or one of ``FAILURES``, with its message."""

    kind: str
    message: str = ""


def try_input(target: Target, prepared: Any, folder: Path, *, seed: int, number: int) -> Outcome:
    """Runs one input in this process."""
    from gdetkd_cli.cli.app import describe_error

    rng = random.Random(f"{seed} {target.name} {number}")
    try:
        with _limit_time():
            target.run(rng, folder, prepared)
    except HangError:
        return Outcome("hang", f"took more than {_SECONDS} s of the processor")
    except AcceptedSilentlyError as error:
        return Outcome("silent", str(error))
    except Exception as error:
        message, code = describe_error(error)
        if code != 70:
            return Outcome("refused", message)
        return Outcome("internal error", message + "\n" + "".join(traceback.format_exception(error)[-6:]))
    return Outcome("accepted")


@contextmanager
def _limit_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _work(name: str, folder: Path, seed: int, connection: Any) -> None:
    """A child process: runs the inputs whose numbers it receives."""
    import torch
    from targets import TARGETS

    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    target = TARGETS[name]
    prepared = target.prepare(folder)
    connection.send(None)
    while True:
        number = connection.recv()
        outcome = try_input(target, prepared, folder, seed=seed, number=number)
        connection.send((outcome.kind, outcome.message))


class Child:
    """A process for the inputs of one target; a new one replaces a process that ended or hung."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        self._arguments = (name, folder, seed)
        self._process: Any = None

    def __call__(self, number: int) -> Outcome:
        if self._process is None:
            self._start()
        self._connection.send(number)
        try:
            if self._connection.poll(_PATIENCE):
                return Outcome(*self._connection.recv())
            outcome = Outcome("hang", f"took more than {_PATIENCE} s")
        except (EOFError, ConnectionError):
            self._process.join()
            outcome = Outcome("crash", f"the process ended with code {self._process.exitcode}")
        self.close()
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(*self._arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # ready

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def fuzz(target: Target, numbers: range | list[int], *, seed: int, folder: Path) -> list[tuple[int, Outcome]]:
    """Runs inputs by their numbers."""
    if target.isolated:
        child = Child(target.name, folder, seed)
        try:
            return [(number, child(number)) for number in numbers]
        finally:
            child.close()
    prepared = target.prepare(folder)
    return [(number, try_input(target, prepared, folder, seed=seed, number=number)) for number in numbers]


def make_once(folder: Path, make: Callable[[Path], Any]) -> Any:
    """Makes the files in an empty folder: a new child process finds those of the one before it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return make(folder)
