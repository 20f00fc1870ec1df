"""End a training that hangs, and say where each rank is."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

import torch.distributed as dist

from megalens.engine.ranks import rank_and_size


class Watchdog:
    """While entered, ends the process when :meth:`at` has not been called for ``seconds``.

    Rank 0 first prints, in one line, where every rank is. A rank that does not answer (stopped, or its machine is gone) is called silent.
    When one rank has ended, the launcher ends the others; if it does not, each ends itself a little later.

    Args:
        seconds: 0: never.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.rank, self.ranks = rank_and_size()
        self._place, self._since = "the start", time.monotonic()
        self._main, self._over = threading.get_ident(), threading.Event()
        self._store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store()) if dist.is_initialized() else None

    def __enter__(self) -> Watchdog:
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def at(self, place: str) -> None:
        """Note that the training moves, and where it is now."""
        self._place, self._since = place, time.monotonic()

    def _watch(self) -> None:
        patience = self.seconds * (1.0 if self.rank == 0 else 1.25)
        told = None  # only once: rank 0 may then be gone, and the store with it
        while not self._over.wait(min(1.0, self.seconds / 10)):
            still = time.monotonic() - self._since
            if still > 0.8 * self.seconds and self._store is not None and told != self._since:
                told = self._since
                self._store.set(str(self.rank), self._here())
            if still > patience:
                if self.rank == 0:
                    print(f"error: no step for {still:.0f} s (stall_seconds={self.seconds:g}); {self._everyone()}", file=sys.stderr)
                    sys.stderr.flush()
                os._exit(1)

    def _here(self) -> str:
        return f"{self._place}, {_line(sys._current_frames().get(self._main))}"

    def _everyone(self) -> str:
        if self._store is None:
            return f"the process is at {self._here()}"
        places = {rank: self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else "silent" for rank in range(self.ranks)}
        places[self.rank] = self._here()
        together: dict[str, list[int]] = {}
        for rank, place in places.items():
            together.setdefault(place, []).append(rank)
        few_first = sorted(together.items(), key=lambda item: len(item[1]))
        return "; ".join(f"rank {', '.join(map(str, ranks))}: {place}" for place, ranks in few_first)


def _line(frame: FrameType | None) -> str:
    """Where a thread is: the innermost line of megalens, and in brackets the innermost function of all."""
    if frame is None:
        return "ended"
    names, ours = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}", ""
    while frame is not None and not ours:
        path = frame.f_code.co_filename
        if f"{os.sep}megalens{os.sep}" in path:
            ours = f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{ours} ({names})"
