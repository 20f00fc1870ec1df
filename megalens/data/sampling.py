"""Which rows a dump holds, and in which order: pure functions of the documents' ids and lengths and a seed.

Every choice is the order of 64-bit hashes, so that it depends on nothing else: neither on the number of ranks, nor on a library's
random generator, nor on what other documents there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
_DOCUMENT, _POSITION, _ROW = 1, 2, 3


def hash64(seed: int, *keys: int | np.ndarray) -> np.ndarray:
    """Uniform 64-bit hashes of ``(seed, *keys)``, keys broadcast; splitmix64's finaliser folded over them."""
    state = np.array([seed & _MASK], dtype=np.uint64)
    for key in keys:
        state = _mix(state ^ _mix(np.atleast_1d(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Rows:
    """Some rows of a dump, in the dump's order.

    Args:
        document_N: each row's document, an index into ``source_K``.
        position_N: each row's token position P.
        source_K: the documents needed, as row numbers of the pretokenized split.
    """

    document_N: np.ndarray
    position_N: np.ndarray
    source_K: np.ndarray


class RowOrder:
    """The rows of one split, in the dump's order.

    Documents are put in a random order; each gives ``per_document`` distinct random positions from ``min_pos`` up to its end (or to
    ``seq_len``), fewer where it is shorter; the first ``rows`` of these, cut into shards of ``rows_per_shard``, are the dump, shuffled
    once more within each shard.

    Args:
        doc_id_K: ids of the documents.
        length_K: their lengths in tokens.
        seed: of all three random choices.
        rows: how many; None: all there are.
        tokens: documents are taken only as long as their (cut) lengths add up to no more; None: all.

    Attributes:
        available: rows the documents can give.
        rows: rows of the dump, at most ``available``.
    """

    def __init__(
        self,
        doc_id_K: np.ndarray,
        length_K: np.ndarray,
        *,
        seed: int,
        seq_len: int,
        min_pos: int,
        per_document: int,
        rows_per_shard: int,
        rows: int | None = None,
        tokens: int | None = None,
    ):
        self._seed, self._min_pos, self._per_shard = seed, min_pos, rows_per_shard
        self._doc_id_K, self._length_K = doc_id_K, np.minimum(length_K, seq_len)
        count_K = np.clip(self._length_K - min_pos, 0, per_document)
        self._order = np.argsort(hash64(seed, _DOCUMENT, doc_id_K), kind="stable")
        if tokens is not None:
            self._order = self._order[: np.searchsorted(np.cumsum(self._length_K[self._order]), tokens, side="right")]
        self._ends = np.cumsum(count_K[self._order])
        self.available = int(self._ends[-1]) if len(self._ends) else 0
        self.rows = self.available if rows is None else min(rows, self.available)

    def shard(self, index: int) -> Rows:
        """The rows of shard ``index``."""
        first = index * self._per_shard
        numbers = np.arange(first, min(first + self._per_shard, self.rows))
        place = np.searchsorted(self._ends, numbers, side="right")
        nth_document, document = np.unique(place, return_inverse=True)
        draw = numbers - np.where(place > 0, self._ends[place - 1], 0)
        source = self._order[nth_document]
        position = self._positions(source, document, draw)
        shuffled = np.argsort(hash64(self._seed, _ROW, numbers), kind="stable")
        return Rows(document[shuffled], position[shuffled], source)

    def _positions(self, source: np.ndarray, document: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """The ``draw``-th position of each row's document; documents are handled in small groups to bound memory."""
        result = np.empty(len(document), np.int64)
        for first in range(0, len(source), 1024):
            group = source[first : first + 1024]
            candidates = np.arange(self._min_pos, self._length_K[group].max())
            weight = hash64(self._seed, _POSITION, self._doc_id_K[group][:, None], candidates)
            weight[candidates >= self._length_K[group][:, None]] = _MASK
            order = np.argsort(weight, axis=1, kind="stable")
            rows = np.flatnonzero((document >= first) & (document < first + 1024))
            result[rows] = candidates[order[document[rows] - first, draw[rows]]]
        return result
