"""Stopping cleanly: a signal is remembered, and the training stops behind the step it is in; children stop with their parent."""

from __future__ import annotations

import ctypes
import signal
import sys
import time

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: Slurm's warning ahead of the time limit
_IMPATIENCE = 1.0  # seconds; a launcher passes on the Ctrl-C that its processes have already got from the terminal


class StopSignals:
    """While entered: SIGTERM, SIGUSR1 and SIGINT set :attr:`received`. A second SIGINT, a moment later, stops at once.

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
    """For ``preexec_fn``: on Linux, a child whose parent is killed is told to stop, so that the next attempt finds nobody at work."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
