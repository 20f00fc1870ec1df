"""Commands run one after another, that stop cleanly and share their folders with other pipelines."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalens.files import Lock
from megalens.training.signals import end_with_parent, leave_dead_terminal, stop, stopping


class Runner:
    """Runs stages one after another; a stop signal goes to the running stage, and no other starts after it."""

    def __init__(self) -> None:
        self.stage: subprocess.Popen | None = None
        self.stopped_by: int | None = None
        for number in stopping():
            signal.signal(number, self._stop)

    @contextmanager
    def turn_at(self, target: Path) -> Iterator[None]:
        """While entered, no other pipeline makes ``target``; waits until it is free."""
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(target.parent / f".{target.name}.pipeline")
        waits = False
        while not lock.acquire(wait=False):
            if not waits:
                say(f"{target}: another pipeline is making it, waiting")
            waits = True
            time.sleep(0.5)
            self._leave_if_stopped()
        try:
            yield
        finally:
            lock.release()

    def run(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        """Run a stage to its end.

        Args:
            name: what it is called when it fails.
            command: the program and its arguments.
            environment: this process's, unless another is given.

        Raises:
            SystemExit: the stage failed (its exit code), or a signal stopped it (128 + signal). It has printed its own error.
        """
        if self.stopped_by is None:
            say("$ " + shlex.join(command))
            # Own session: Ctrl-C reaches the stage once, through us, and not a second time through the terminal.
            self.stage = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent)
            code = self.stage.wait()
            self.stage = None
        self._leave_if_stopped()
        if code:
            say(f"{name} failed; the same command goes on from here once that is mended")
            sys.exit(code if code > 0 else 128 - code)

    def _leave_if_stopped(self) -> None:
        if self.stopped_by is not None:
            say("stopped; the same command goes on from here")
            sys.exit(128 + self.stopped_by)

    def _stop(self, number: int, _frame) -> None:
        leave_dead_terminal()
        self.stopped_by = number
        if self.stage is not None:
            stop(self.stage, number)


def say(line: str) -> None:
    """Tell the person at the keyboard, on stderr."""
    print(f"[pipeline] {line}", file=sys.stderr, flush=True)
