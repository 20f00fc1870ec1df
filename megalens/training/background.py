"""Work beside the training, one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A thread for one call at a time; what it raises is raised again where the training next asks after it.

    It ends with the process: a call that is cut off is as one that was killed.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin a call, when the one before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="background", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what a finished call has raised; never waits."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the call to end, and raise what it has raised."""
        self.settle()
        self.check()

    def settle(self, seconds: float | None = None) -> None:
        """Wait, at most so long, for the call to end."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised again by check)
            self._error = error
