"""What every command does alike: ``--help`` prints the docstring, an error is one line and exit code 1."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence

_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENAMETOOLONG}
NO_MEMORY = ("DefaultCPUAllocator: ", "Cannot allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_LONGEST = 600
_LESS_MEMORY = (
    "lower batch_size and raise gradient_accumulation_steps by as much (a dump: activation_dumper.batch_size, an evaluation: "
    "evaluation.batch_size), set verbalizer.checkpoint_every_n_tokens=8, or shard and offload with --deepspeed ds_configs/z3_offload.json; "
    "megalens plan tells what fits"
)


def run(main: Callable[[list[str]], int | None], doc: str, arguments: Sequence[str] | None = None) -> None:
    """Call ``main`` with the command's arguments and exit.

    Args:
        main: takes the arguments, returns the exit code (None: 0).
        doc: the command's docstring, printed for ``--help`` and ``-h``.
        arguments: ``sys.argv[1:]`` where none are given.

    An error of ours (a ``ValueError`` or ``OSError`` class defined in megalens) and a full or forbidden disk become one line on
    stderr and exit code 1, an error with ``complaints`` a line each; so do a package that is not installed, memory that does not
    suffice, and numbers that are not finite. Anything else is a bug and keeps its traceback.
    """
    _ready_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(given):
        print(doc.strip())
        sys.exit(0)
    try:
        code = main(given)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ValueError, OSError, ModuleNotFoundError, MemoryError, FloatingPointError, RuntimeError) as error:
        lines = told(error)
        if not lines:
            raise
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


def _ready_streams() -> None:
    """Give the command the three streams that its starter closed, and let none fail at a sign that the terminal does not have."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:  # the lowest free number: no file that is opened later gets what is printed
                os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def told(error: Exception) -> list[str]:
    """The error in lines, for the person at the keyboard; none: it is a bug."""
    if isinstance(error, ModuleNotFoundError):
        if error.name is None or error.name.split(".")[0] == "megalens":
            return []
        mend = "activate the environment that `make` sets up: . .venv/bin/activate"
        return [f"{error.name} is not installed for {sys.executable}; {mend}"]
    if isinstance(error, FloatingPointError):
        return [f"{_one_line(error)}; lower learning_rate, or compute with dtype=fp32"]
    if is_out_of_memory(error):
        said = _one_line(error).rpartition("DefaultCPUAllocator: ")[2].split(". ")
        return [f"out of memory ({'. '.join(said[:2]) or 'Python had none left'}); {_LESS_MEMORY}"]
    if type(error).__module__.split(".")[0] == "megalens" or (isinstance(error, OSError) and error.errno in _ENVIRONMENT):
        return [_shown(each) for each in getattr(error, "complaints", ())] or [_one_line(error)]
    return []


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class for it on GPUs only (not imported here: help needs no library)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return _shown(error.strerror + (f": {error.filename}" if error.filename else ""))
    return _shown(str(error))


def _shown(text: str) -> str:
    """Text as one line of at most 600 signs, none of which moves the cursor or changes the colour."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 + 5 :]}"
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
