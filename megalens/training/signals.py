"""Stop cleanly: a signal is remembered, and the training stops after its current step. Children stop with their parent."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: Slurm's warning before the time limit
_IMPATIENCE = 1.0  # seconds; a process gets one Ctrl-C from the terminal and the same one again from its launcher


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and SIGINT set :attr:`received`. A second SIGINT more than a second later stops at once.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in _WATCHED}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _IMPATIENCE:
            raise KeyboardInterrupt


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """For ``preexec_fn``: on Linux, send a child SIGTERM when its parent dies, so that it is gone when the parent is started again."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
