"""Report the failure of a rank once: by that rank, not by every rank that loses it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from megalens.engine.ranks import leave_ranks
from megalens.engine.state import EngineError
from megalens.launcher import rank

_PATIENCE = 5.0  # seconds for the first rank to report its failure, and for the launcher to end the others


class LostRank(EngineError):
    """Another process has ended, and no remaining one knows why. The message is one line."""


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Wrap a rank's whole work; leave the process group at the end.

    The error of the first rank to fail passes through. Ranks that fail later, of the same error or because the first is gone, say nothing:
    they wait for their launcher to end them, then exit with code 1. Before there is a process group most errors strike all ranks alike.
    Then rank 0 reports at once, and another rank only if its launcher has not ended it in the meantime.

    Raises:
        LostRank: in place of an error of gloo or NCCL, when another process died before it could report anything.
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
