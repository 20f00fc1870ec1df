"""What every command does alike: ``--help`` prints the docstring, an error is one line and exit code 1."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENAMETOOLONG}


def run(main: Callable[[list[str]], int | None], doc: str, arguments: Sequence[str] | None = None) -> None:
    """Call ``main`` with the command's arguments and exit.

    Args:
        main: takes the arguments, returns the exit code (None: 0).
        doc: the command's docstring, printed for ``--help`` and ``-h``.
        arguments: ``sys.argv[1:]`` where none are given.

    An error of ours (a ``ValueError`` or ``OSError`` class defined in megalens) and a full or forbidden disk become one line on
    stderr and exit code 1, and so does a package that is not installed; anything else is a bug and keeps its traceback.
    """
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
    except (ValueError, OSError) as error:
        if not _is_expected(error):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "megalens":
            raise
        mend = "activate the environment that `make` sets up: . .venv/bin/activate"
        print(f"error: {error.name} is not installed for {sys.executable}; {mend}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)


def _is_expected(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] == "megalens" or (isinstance(error, OSError) and error.errno in _ENVIRONMENT)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split())
