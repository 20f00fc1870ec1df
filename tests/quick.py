"""Python commands that start within a moment: each is forked from a process that has imported the libraries and megalens.

An import of PyTorch, transformers and DeepSpeed takes seconds of a core, and most tests that start a command are not about it. Arguments,
folder, environment, streams, session and exit code are the command's own. Real starts of every kind (by path, by module, by torchrun, by
deepspeed, by Slurm, from a wheel) stay in the tests that are about them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_OURS = {str(ROOT), *(str(ROOT / name) for name in ("tests", "tools", "benchmarks"))}


def context():
    """A multiprocessing context whose processes start within a moment."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH", "")
    context.set_forkserver_preload(["loaded"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before])  # where it finds loaded.py
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


class Started:
    """A command at work; like :class:`subprocess.Popen`. What it prints on both streams is in :meth:`printed`."""

    def __init__(self, command: Sequence[str], cwd: Path, environment: Mapping[str, str]):
        self.args, self._folder = [*map(str, command)], tempfile.TemporaryDirectory()
        assert self.args[0] in (sys.executable, "python")
        self._streams = [Path(self._folder.name) / name for name in ("out", "err")]
        self._process = context().Process(target=_become, args=(self.args, str(cwd), dict(environment), self._streams), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative a signal's number; None: still at work."""
        return self._process.exitcode

    def wait(self) -> int:
        """The exit code at its end."""
        self._process.join()
        return self._process.exitcode

    def printed(self) -> tuple[str, str]:
        """What it has printed on stdout and on stderr."""
        return tuple(path.read_text(errors="replace") if path.exists() else "" for path in self._streams)


def run(command: Sequence[str], cwd: Path = Path(), environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess:
    """A command from its start to its end; ``command`` begins as in ``[sys.executable, "script.py"]`` or ``[..., "-m", "module"]``."""
    started = Started(command, Path(cwd).absolute(), environment)
    code = started.wait()
    return subprocess.CompletedProcess(started.args, code, *started.printed())


def run_ranks(
    count: int, command: Sequence[str], cwd: Path, environment: Mapping[str, str], port: int
) -> list[subprocess.CompletedProcess]:
    """A command on several ranks, which meet as torchrun has them meet; where one fails, the others are ended."""
    shared = dict(environment) | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [Started(command, cwd, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank._process.kill()
        time.sleep(0.02)
    return [subprocess.CompletedProcess(rank.args, rank.wait(), *rank.printed()) for rank in ranks]


def _become(command: list[str], cwd: str, environment: dict[str, str], streams: list[Path]) -> None:
    """Be the command, as far as a fork can."""
    multiprocessing.current_process()._config["daemon"] = False  # a daemon may start no processes
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _, first, *rest = command
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    libraries = [path for path in sys.path if path not in _OURS]
    code: object = 0
    try:
        if first == "-m":
            sys.argv, sys.path[:] = ["-m", *rest[1:]], [cwd, *given, *libraries]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:] = [first, *rest], [str(Path(first).resolve().parent), *given, *libraries]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 (what the interpreter does)
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # a forked process skips them
    sys.exit(code)
