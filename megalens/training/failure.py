"""One rank's failure is told once: by itself, not by all the ranks that lose it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from megalens.engine.base import leave_ranks
from megalens.engine.state import EngineError
from megalens.launcher import rank

_PATIENCE = 5.0  # seconds in which the first to fail has told it and the launcher ends the others


class LostRank(EngineError):
    """Another process has ended, and none of the living knows why. The message is one line."""


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """For a rank's whole work; leaves the process group at its end.

    An error of a rank passes through; the ranks that fail after it, of the same error or for want of it, wait for their launcher to end
    them, and exit with code 1 without a word. Ahead of the process group, where an error is mostly everybody's, rank 0 tells it, and
    another rank when the launcher has not ended it.

    Raises:
        LostRank: instead of the errors of gloo and NCCL when another process died before it could tell anything.
    """
    try:
        yield
    except Exception as error:
        if not dist.is_initialized():
            if rank():
                time.sleep(_PATIENCE)
            raise
        if not _is_first_to_fail():
            time.sleep(_PATIENCE)
            sys.exit(1)
        if _is_of_transport(error):
            place = f"rank {dist.get_rank()} of {dist.get_world_size()}"
            reason = " ".join(str(error).split()).partition(". ")[0]
            mend = "the launcher says which process ended, and with what code (-9: killed, mostly for want of memory)"
            raise LostRank(f"{place} has lost another process ({reason}); {mend}") from None
        raise
    finally:
        leave_ranks()


def _is_first_to_fail() -> bool:
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store went down with rank 0, whose launcher says so
        return False


def _is_of_transport(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error))
