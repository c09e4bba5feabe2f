"""Signals that stop a run: SIGINT, SIGTERM, and SIGUSR1, which schedulers send before a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from gdetkd_cli.errors import StoppedError

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Raises a ``StoppedError`` on a signal, at once or, inside ``deferred``, when the caller asks for it.

    Attributes:
        received: the number of the signal that waits; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._seen: set[int] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals until the end of the block. Only a main thread can; others keep Python's handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block finish: a signal is only noted. The same one again stops the block at once.

        Another one does not, because a scheduler and a parent process may both pass on that the run shall stop.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and number not in self._seen:
            self._seen.add(number)
            self.received = self.received or number
            return
        raise StoppedError(f"stopped by {signal.Signals(number).name}", number)
