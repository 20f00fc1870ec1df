"""The processes that work together: how they find each other, which share of the work each has, and a few words between them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megalens.config import Config
from megalens.engine.state import EngineError
from megalens.launcher import launched

Batch = TypeVar("Batch", bound=Sized)
Result = TypeVar("Result")


def join_ranks(device: torch.device) -> None:
    """Enter the process group that the launcher (torchrun, deepspeed) describes in the environment; nothing for a single process.

    Raises:
        EngineError: the processes do not find each other.
    """
    place = launched()
    if place.size == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = " ".join(str(error).split()).partition(". ")[0]
        mend = "start all of them, each with the same MASTER_ADDR and a free MASTER_PORT; or unset RANK WORLD_SIZE LOCAL_RANK"
        raise EngineError(f"process {place.rank} of {place.size} does not find the others at {where} ({reason}); {mend}") from None


def join_alone(device: torch.device) -> None:
    """A process group of one for an engine that always wants one, when no launcher made a larger one."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def leave_ranks() -> None:
    """Leave the process group, when in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_share(config: Config) -> tuple[int, int]:
    """Which share of every batch this process works on, and how many shares there are (ranks of one tensor-parallel group: the same)."""
    rank, size = rank_and_size()
    together = config.fsdp.tensor_ranks if config.engine == "fsdp" else 1
    return rank // together, max(1, size // together)


class Traffic:
    """What an engine's collectives have moved: calls by kind, and the bytes of the whole tensors."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def add(self, kind: str, whole: Tensor) -> None:
        """One collective over a tensor."""
        self.calls[kind] += 1
        self.bytes += whole.numel() * whole.element_size()

    def take(self) -> tuple[int, int]:
        """Calls and bytes since this was last asked."""
        taken = self.calls.total(), self.bytes
        self.calls.clear()
        self.bytes = 0
        return taken


class Ranks:
    """Processes that do one piece of work together: which of them this is, and what they say to each other.

    All of them call each method, in the same order.

    Args:
        device: where this process computes.
        config: how they share the work (:func:`data_share`); None: this process works alone, whoever else there is.

    Attributes:
        rank, world_size: this process's number, and how many there are.
        data_rank, data_ranks: which share of the work is this process's, and how many there are.
    """

    def __init__(self, device: torch.device, config: Config | None = None):
        self.device, self.traffic = device, Traffic()
        self.rank, self.world_size = (0, 1) if config is None else rank_and_size()
        self.data_rank, self.data_ranks = (0, 1) if config is None else data_share(config)

    @property
    def is_main(self) -> bool:
        """Is this the rank that writes and prints?"""
        return self.rank == 0

    def reduce_mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of scalars that every rank has under the same names."""
        names = sorted(values)
        total = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=self.device)
        self._sum(total)
        return dict(zip(names, (total / self.world_size).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Is the flag up on any rank?"""
        total = torch.tensor([float(flag)], device=self.device)
        self._sum(total)
        return total.item() > 0

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in their order, on all ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def by_main(self, call: Callable[[], Result]) -> Result:
        """What a call gives (small and picklable) that rank 0 alone makes, on all ranks. An error of it ends them all."""
        if self.world_size == 1:
            return call()
        found = [call() if self.is_main else None]
        dist.broadcast_object_list(found, 0, device=self.device)
        return found[0]  # type: ignore[return-value]

    def divide(self, count: int, work: Callable[[int, bool], Result]) -> list[Result]:
        """Divide numbered pieces of work; the results of all of them, in their order, on all ranks.

        Every rank does equally many, so that ranks may share the weights of what they call. One for which no piece is left does the last
        piece again.

        Args:
            count: of pieces.
            work: takes the piece's number, and whether this rank is the one whose result counts; gives what is small and picklable.
        """
        mine, speaks = {}, self.rank % (self.world_size // self.data_ranks) == 0  # ranks that work on the same share have the same
        for first in range(0, count, self.data_ranks):
            number = first + self.data_rank
            counts = speaks and number < count
            result = work(min(number, count - 1), counts)
            if counts:
                mine[number] = result
        every = {number: result for part in self.gather(mine) for number, result in part.items()}
        return [every[number] for number in range(count)]

    def divide_batches(self, batches: Sequence[Batch], work: Callable[[Batch], Result]) -> list[Result]:
        """:meth:`divide` for batches of one size but for a shorter last one, which comes in a turn of its own.

        How often work calls what the ranks share may so depend on how many rows it is given.

        Args:
            batches: of what :func:`len` counts.
        """
        alike = sum(len(batch) == len(batches[0]) for batch in batches)
        done = self.divide(alike, lambda number, _: work(batches[number]))
        return done + self.divide(len(batches) - alike, lambda number, _: work(batches[alike + number]))

    def join_parts(self, parts: Tensor) -> None:
        """Put together on rank 0, in place, a tensor of which each rank has filled some parts and left the others 0; exact to the bit."""
        if self.world_size > 1:
            dist.reduce(parts.view(torch.uint8), 0)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def close(self) -> None:
        """Finish; what was sharded is of no use afterwards."""

    def _sum(self, values: Tensor) -> None:
        if self.world_size > 1:
            self.traffic.add("all_reduce", values)
            dist.all_reduce(values)
