"""Batches of activations in an order that depends on the seed and the epoch alone.

The order of an epoch has two levels, so that memory is bounded whatever the size of the dump: the record batches of all shards are
permuted and cut into windows of about ``window_bytes``; the rows of a window are permuted. A dump that fits one window is shuffled
fully. Global batch ``b`` is rows ``[b B, (b + 1) B)`` of that order, and a rank takes its contiguous share of it; the rows left over
at the end of an epoch are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalens.data import DataError
from megalens.data.shards import ShardReader

Batch = dict[str, Tensor]
_PREFETCH = 8


class ActivationLoader:
    """Batches of one dump.

    Args:
        folder: the dump's folder.
        batch_size: rows of a GLOBAL batch, over all ranks.
        seed: of the order.
        rank, world_size: which share of each global batch :meth:`batches` gives.
        window_bytes: memory for the rows that are mixed. Part of the order: another window is another order.

    Attributes:
        num_rows: rows of the dump.
        steps_per_epoch: whole global batches in it.
        reader: the :class:`ShardReader`.

    A batch is a dict of CPU tensors: ``activation [B, d]`` float32, ``input_ids [B, seq_len]`` int64 (the context's tokens 0..P, 0 behind
    them), ``position [B]`` (P), ``sample_id [B]`` (the row's number in the dump), ``doc_id [B]``, all int64.

    Raises:
        DataError: the dump is unusable or smaller than one batch, or the ranks can not share a batch evenly.
    """

    def __init__(self, folder: str | Path, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, window_bytes: int = 256 << 20):
        self.reader = ShardReader(folder)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed % (1 << 63), rank, world_size
        self.num_rows = len(self.reader)
        self.steps_per_epoch = self.num_rows // batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{folder} holds {self.num_rows} rows, less than one batch_size={batch_size}; lower batch_size, or dump more rows "
                "(activation_dumper.num_samples, val_num_samples, vectors_per_sequence)"
            )
        if batch_size % world_size:
            raise DataError(
                f"batch_size={batch_size} can not be shared evenly by {world_size} processes; make it a multiple of {world_size}"
            )
        self._first_row = np.concatenate([[0], np.cumsum(self.reader.batch_rows)])
        meta = self.reader.meta
        row_bytes = meta["d"] * (4 if meta["encoding"] == "fp32" else 2) + 4 * meta["seq_len"]
        self._window_batches = max(1, window_bytes // (row_bytes * meta["rows_per_batch"]))

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's share of global micro-step ``start_step`` and all that follow, over the epochs without end.

        A background thread reads ahead; it ends when the iterator is closed or forgotten.
        """
        source = self._batches(start_step)
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(next, source) for _ in range(_PREFETCH))
            try:
                while True:
                    batch = ahead.popleft().result()
                    ahead.append(reader.submit(next, source))
                    yield batch
            finally:
                reader.shutdown(cancel_futures=True)

    def rows(self, indices: Tensor | np.ndarray | list[int]) -> Batch:
        """Exactly these rows (numbers in the dump, ``sample_id``), in this order; for evaluation."""
        indices = np.asarray(indices, dtype=np.int64)
        owner = np.searchsorted(self._first_row, indices, side="right") - 1
        parts, places = [], []
        for index in np.unique(owner):
            wanted = np.flatnonzero(owner == index)
            parts.append(_take(self.reader.read_batch(index), indices[wanted] - self._first_row[index]))
            places.append(wanted)
        return _finish(_take(_join(parts), np.argsort(np.concatenate(places))))

    def documents(self) -> Tensor:
        """``doc_id`` of every row of the dump, int64."""
        return torch.from_numpy(self.reader.column("doc_id").astype(np.int64))

    def _batches(self, step: int) -> Iterator[Batch]:
        share = self.batch_size // self.world_size
        epoch, held, window = -1, -1, {}
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch, held = step // self.steps_per_epoch, -1
                windows = self._windows(epoch)
                ends = np.cumsum([self.reader.batch_rows[w].sum() for w in windows])
            first = step % self.steps_per_epoch * self.batch_size + self.rank * share
            parts = []
            for w, start, stop in _pieces(ends, first, first + share):
                if w != held:
                    held, window = w, {}  # free the old window before the next one is read
                    window = self._read_window(epoch, w, windows[w])
                parts.append({name: value[start:stop] for name, value in window.items()})
            yield _finish(_join(parts))
            step += 1

    def _windows(self, epoch: int) -> list[np.ndarray]:
        """The record batches of each window of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.reader.batch_rows))
        return np.split(order, range(self._window_batches, len(order), self._window_batches))

    def _read_window(self, epoch: int, number: int, batches: np.ndarray) -> Batch:
        count = int(self.reader.batch_rows[batches].sum())
        place = torch.from_numpy(np.random.default_rng([self.seed, epoch, number + 1]).permutation(count))
        window: Batch = {}
        for part, places in zip(batches, place.split(self.reader.batch_rows[batches].tolist()), strict=True):
            for name, value in self.reader.read_batch(part).items():
                window.setdefault(name, value.new_empty(count, *value.shape[1:]))[places] = value
        return window


def _pieces(ends: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Rows ``first`` to ``last`` of an epoch as (window, start, stop) inside the windows that end at ``ends``."""
    window = int(np.searchsorted(ends, first, side="right"))
    while first < last:
        begin, end = (int(ends[window - 1]) if window else 0), int(ends[window])
        stop = min(last, end)
        yield window, first - begin, stop - begin
        first, window = stop, window + 1


def _take(rows: Batch, index: np.ndarray) -> Batch:
    index = torch.from_numpy(index)
    return {name: value[index] for name, value in rows.items()}


def _join(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _finish(rows: Batch) -> Batch:
    return {**rows, "activation": rows["activation"].float(), "input_ids": rows["input_ids"].long()}
