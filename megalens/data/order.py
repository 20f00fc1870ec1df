"""Which row comes when: pure functions of the seed and the epoch, that no rank, worker or restart can change.

The order of one dump has two levels, so that memory is bounded whatever its size: its record batches are permuted and cut into windows;
the rows of a window are permuted. Several dumps are mixed by dealing the places of an epoch out to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from megalens.data.sampling import hash64

_BLOCK = 4096


class FolderOrder:
    """The epochs of one dump.

    Args:
        batch_rows: rows of each of its record batches.
        window_batches: record batches of a window.
        seed: of both permutations.
        number: of the dump among those that are mixed; each has its own permutations.

    Attributes:
        largest_window: rows that a window may have at most.
    """

    def __init__(self, batch_rows: np.ndarray, window_batches: int, seed: int, number: int = 0):
        self._batch_rows, self._window_batches = batch_rows, window_batches
        self.largest_window = int(np.sort(batch_rows)[-window_batches:].sum())
        self._seed = seed if number == 0 else int(hash64(seed, number)[0] >> np.uint64(1))
        self._epoch = -1

    def pieces(self, epoch: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Rows ``first`` to ``last`` of an epoch as (window, start, stop) inside the windows."""
        ends = self._enter(epoch)[1]
        window = int(np.searchsorted(ends, first, side="right"))
        while first < last:
            begin, end = (int(ends[window - 1]) if window else 0), int(ends[window])
            stop = min(last, end)
            yield window, first - begin, stop - begin
            first, window = stop, window + 1

    def window(self, epoch: int, window: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The record batches of a window, and for each the places that its rows take in the window."""
        batches = self._enter(epoch)[0][window]
        rows = self._batch_rows[batches]
        places = np.random.default_rng([self._seed, epoch, window + 1]).permutation(rows.sum())
        return batches, np.split(places, np.cumsum(rows)[:-1])

    def _enter(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The windows of an epoch, and the row behind each."""
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._batch_rows))
            windows = np.split(order, range(self._window_batches, len(order), self._window_batches))
            self._epoch, self._held = epoch, (windows, np.cumsum([self._batch_rows[w].sum() for w in windows]))
        return self._held


class Mixture:
    """How the places of an epoch are dealt out to several dumps.

    Within any ``4096 k`` places from the start of an epoch each dump has its share to the row; inside a block of 4096 the order is random.

    Args:
        rows: of each dump.
        weights: their shares, in any unit.

    Attributes:
        shares: of each dump, exact, adding up to 1.
        rows: places of an epoch: it ends when the first dump is used up, so no row comes twice in it.
    """

    def __init__(self, rows: list[int], weights: list[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self._main = int(np.argmax(weights))  # takes what rounding leaves
        slack = [len(rows) - 1 if i == self._main else 0 for i in range(len(rows))]
        self.rows = max(0, min(math.floor((n - s) / share) for n, s, share in zip(rows, slack, self.shares, strict=True)))
        self._dealt = (-1, -1, np.empty(0))

    def deal(self, seed: int, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Places ``first`` to ``last`` of an epoch.

        Returns:
            the dump of each place ``[last - first]``, and for each dump how many places before ``first`` were its ``[dumps]``.
        """
        if len(self.shares) == 1:
            return np.zeros(last - first, np.int64), np.array([first])
        block = first // _BLOCK
        order = self._block(seed, epoch, block)
        before = self._before(block * _BLOCK) + np.bincount(order[: first - block * _BLOCK], minlength=len(self.shares))
        parts, at = [], first
        while at < last:
            block = at // _BLOCK
            stop = min(last, (block + 1) * _BLOCK)
            parts.append(self._block(seed, epoch, block)[at - block * _BLOCK : stop - block * _BLOCK])
            at = stop
        return np.concatenate(parts), before

    def _before(self, place: int) -> np.ndarray:
        count = np.array([math.floor(place * share) for share in self.shares])
        count[self._main] += place - count.sum()
        return count

    def _block(self, seed: int, epoch: int, block: int) -> np.ndarray:
        if self._dealt[:2] != (epoch, block):
            count = self._before(min((block + 1) * _BLOCK, self.rows)) - self._before(block * _BLOCK)
            order = np.random.default_rng([seed, epoch, 0, block]).permutation(np.repeat(np.arange(len(count)), count))
            self._dealt = (epoch, block, order)
        return self._dealt[2]
