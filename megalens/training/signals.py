"""Stop cleanly: a signal is remembered, and the training stops after its current step. Children stop with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_IMPATIENCE = 1.0  # seconds; a process gets one Ctrl-C from the terminal and the same one again from its launcher
_TERMINALS = [number for number in (1, 2) if os.isatty(number)]
_LAUNCHER = "deepspeed.launcher.launch"


def stopping() -> list[int]:
    """The signals that ask for a stop: SIGINT, SIGTERM, and SIGHUP (the terminal is gone) unless ``nohup`` ignores it."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def leave_dead_terminal() -> None:
    """Discard what is printed to a terminal that is gone; otherwise printing would fail."""
    for number in _TERMINALS:
        if not os.isatty(number):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class StopSignals:
    """While entered, the signals of :func:`stopping` and SIGUSR1 set :attr:`received`.

    A second SIGINT more than a second later stops at once.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._since = 0.0
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        watched = [*stopping(), signal.SIGUSR1]  # USR1: Slurm's warning before the time limit
        self._before = {number: signal.signal(number, self._receive) for number in watched}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        leave_dead_terminal()
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _IMPATIENCE:
            raise KeyboardInterrupt


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """For ``preexec_fn``: on Linux, send a child SIGTERM when its parent dies, so that it is gone when the parent is started again."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def stop(process: subprocess.Popen, number: int) -> None:
    """Send a stop signal to a command that was started here; the command ends after all of its own processes.

    The ``deepspeed`` command would die at once and leave its ranks running. So its ranks get the signal, and the command ends after them.
    """
    arguments = process.args if isinstance(process.args, Sequence) and not isinstance(process.args, str) else []
    ranks = _ranks_of(process.pid) if _is_deepspeed([str(argument) for argument in arguments]) else []
    if not ranks:
        process.send_signal(number)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(rank, number)


def stop_with_deepspeed() -> None:
    """Send this rank SIGTERM when its DeepSpeed launcher, or the ``deepspeed`` command that started the launcher, is gone.

    The command dies of a signal at once; its launcher and ranks would run on. On several machines ranks are ended in another way.
    """
    if "CROSS_SIZE" not in os.environ:  # DeepSpeed's launcher sets it
        return
    import psutil  # comes with DeepSpeed

    launcher = psutil.Process().parent()
    command = launcher.parent() if launcher is not None and _LAUNCHER in launcher.cmdline() else None
    if command is not None and _is_deepspeed(command.cmdline()):
        threading.Thread(target=_watch, args=(launcher, command.pid), name="deepspeed", daemon=True).start()


def _watch(launcher, command: int) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):  # it goes between two looks
        while os.getppid() == launcher.pid and launcher.ppid() == command:
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_deepspeed(arguments: Sequence[str]) -> bool:
    return any(Path(argument).name == "deepspeed" or argument == "deepspeed.launcher.runner" for argument in arguments[:3])


def _ranks_of(command: int) -> list[int]:
    """The ranks that a ``deepspeed`` command has started on this machine."""
    import psutil

    try:
        launchers = [child for child in psutil.Process(command).children() if _LAUNCHER in child.cmdline()]
        return [rank.pid for launcher in launchers for rank in launcher.children()]
    except psutil.NoSuchProcess:  # it is ending
        return []
