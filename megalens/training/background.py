"""Work that runs beside the training, one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread that runs one call at a time. An exception of the call is raised again by the next :meth:`check` or :meth:`wait`.

    The thread is a daemon: it ends with the process, in the middle of a call if need be.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the call before, then start this one."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="background", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the exception of a finished call, if it had one; never wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the call to end, then raise its exception, if it had one."""
        self.settle()
        self.check()

    def settle(self, seconds: float | None = None) -> None:
        """Wait for the call to end, at most so many seconds; raise nothing."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised again by check)
            self._error = error
