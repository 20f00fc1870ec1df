"""Batches of activations in an order that depends on the seed and the epoch alone (:mod:`megalens.data.order`).

Global batch ``b`` of an epoch is rows ``[b B, (b + 1) B)`` of the order, and a rank takes its contiguous share of it; what is left over at
the end of an epoch is dropped. Every rank and worker reads whole windows: decoding is some hundred times faster than training.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megalens.batch import Batch
from megalens.data import DataError
from megalens.data.encoding import encoding_of
from megalens.data.order import FolderOrder, Mixture
from megalens.data.shards import ShardReader
from megalens.statistics import ActivationStatistics

Columns = dict[str, Tensor]  # rows by the names of Batch; in the shards' dtypes until they are finished
Place = tuple[int, int]  # (epoch, row)
Chunk = tuple[list[Place], Columns]  # some batches, one behind the other
_CHUNK_BYTES, _CHUNK_BATCHES = 2 << 20, 16  # batches are read several at a time
_AHEAD = 3
_DECODERS = 2


class Reader(Protocol):
    """What a loader reads rows from: :class:`~megalens.data.shards.ShardReader`, or the subject itself where there is no dump.

    Attributes:
        folder: for messages.
        meta: ``meta.json`` of a dump.
        identity: a hash of what the rows are.
        batch_rows: how many rows each batch holds.
    """

    folder: str | Path
    meta: dict[str, Any]
    identity: str
    batch_rows: np.ndarray

    @property
    def statistics(self) -> ActivationStatistics:
        """Of the rows' activations."""
        ...

    def __len__(self) -> int: ...

    def read_batch(self, index: int) -> Columns:
        """The rows of a batch, by the names of :class:`~megalens.batch.Batch`."""
        ...

    def column(self, name: str) -> np.ndarray:
        """One number per row (``doc_id``, ``position``, ``sample_id``), all rows."""
        ...

    def check_matches(self, wanted: dict) -> None:
        """Refuse rows of another model, tokenizer or layer with a :class:`~megalens.data.DataError`."""
        ...


class ActivationLoader(IterableDataset):
    """Batches of one dump, or of several mixed by weight.

    A ``torch.utils.data`` dataset of whole batches: ``DataLoader(loader, batch_size=None, num_workers=...)`` works on it, and so does
    iterating it; :meth:`batches` is what the training uses.

    Args:
        source: a dump's folder (a path, or anything ``fsspec`` opens, e.g. ``s3://...``), a reader, or a dictionary of folders and the
            share of the rows that each shall give.
        batch_size: rows of a GLOBAL batch, over all ranks.
        seed: of the order.
        rank, world_size: which share of each global batch is this one's.
        window_bytes: memory for the rows that are mixed. Part of the order: another window is another order.
        workers: processes of :meth:`batches` that read ahead; 0: a thread.

    Attributes:
        num_rows: rows of an epoch (of a mixture: until the first dump is used up), before it is cut to whole batches.
        steps_per_epoch: whole global batches in it.
        readers: one for each dump; ``reader`` is the first.
        statistics: of the activations of an epoch, each dump by its share.
        identity: a hash of what the rows are, for those who must know that they are the same.

    A batch is a :class:`~megalens.batch.Batch` of CPU tensors, pinned where there is a GPU. In a mixture ``sample_id`` counts the rows of
    all dumps, put one behind the other.

    Raises:
        DataError: a dump is unusable or smaller than one batch, dumps of different models are mixed, or the ranks cannot share a batch.
    """

    def __init__(
        self,
        source: str | Path | Reader | dict[str, float],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_bytes: int = 256 << 20,
        workers: int = 0,
    ):
        shares: dict[Any, float] = source if isinstance(source, dict) else {source: 1.0}
        self.readers: list[Reader] = [ShardReader(folder) if isinstance(folder, (str, Path)) else folder for folder in shares]
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed % (1 << 63), rank, world_size
        self.workers = workers
        self._check(shares)
        rows = [len(reader) for reader in self.readers]
        self._mixture = Mixture(rows, list(shares.values()))
        self._first_id = np.cumsum([0, *rows])
        self._windows = [
            _Windows(reader, self.seed, number, window_bytes // len(self.readers)) for number, reader in enumerate(self.readers)
        ]
        self.num_rows = self._mixture.rows
        self.steps_per_epoch = self.num_rows // batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{', '.join(str(r.folder) for r in self.readers)}: {self.num_rows} rows are less than one batch_size={batch_size}; lower "
                "batch_size, or dump more rows (activation_dumper.num_samples, val_num_samples, vectors_per_sequence)"
            )
        what = [[reader.identity for reader in self.readers], *([list(map(float, shares.values()))] if len(shares) > 1 else [])]
        self.identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        self._epoch, self._row = 0, 0

    # ------------------------------------------------------------------------------------------------------- in order

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """This rank's share of global micro-step ``start_step`` and all that follow, over the epochs without end.

        A thread or ``workers`` processes read ahead; they end when the iterator is closed or forgotten.
        """
        self._epoch, self._row = start_step // self.steps_per_epoch, start_step % self.steps_per_epoch * self.batch_size
        source = self._chunks_by_workers() if self.workers else self._chunks_by_thread()
        try:
            for chunk in source:
                yield from self._hand_out(chunk)
        finally:
            source.close()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where :meth:`load_state_dict` or an earlier iteration left off; in a ``DataLoader``'s worker, that worker's."""
        worker = get_worker_info()
        places = self._places() if worker is None else islice(self._places(), worker.id, None, worker.num_workers)
        for chunk in self._chunks(places):
            yield from self._hand_out(chunk)

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, behind the batch handed out last, to the row: plain numbers and text.

        With a ``DataLoader`` of your own around this loader the workers move copies of it; use ``workers`` and :meth:`batches` instead.
        """
        return {"identity": self.identity, "seed": self.seed, "window": self._window_batches(), "epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a :meth:`state_dict`, on any number of ranks and workers, with any ``batch_size``: no row is lost or doubled.

        Raises:
            DataError: it is of another order (other rows, weights, seed or window).
        """
        here = self.state_dict()
        for key in ("identity", "seed", "window"):
            if state[key] != here[key]:
                raise DataError(f"the order cannot go on: its {key} was {state[key]} and is {here[key]}; load the same dumps alike")
        self._epoch, self._row = state["epoch"], state["row"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": [w.emptied() for w in self._windows]}

    def _window_batches(self) -> list[int]:
        return [windows.size for windows in self._windows]

    def _hand_out(self, chunk: Chunk) -> Iterator[Batch]:
        share = self.batch_size // self.world_size
        for number, (epoch, row) in enumerate(chunk[0]):
            self._epoch, self._row = epoch, row + self.batch_size
            yield cast(Batch, {name: value[number * share : (number + 1) * share] for name, value in chunk[1].items()})

    def _chunks_by_thread(self) -> Generator[Chunk, None, None]:
        source = self._chunks(self._places())
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(_next_pinned, source) for _ in range(_AHEAD))
            try:
                while True:
                    chunk = ahead.popleft().result()
                    ahead.append(reader.submit(_next_pinned, source))
                    yield chunk
            finally:
                reader.shutdown(cancel_futures=True)

    def _chunks_by_workers(self) -> Generator[Chunk, None, None]:
        options: dict[str, Any] = {"pin_memory": torch.cuda.is_available(), "prefetch_factor": _AHEAD, "generator": torch.Generator()}
        options["worker_init_fn"] = _leave_signals
        for chunk in DataLoader(_Chunks(self), batch_size=None, num_workers=self.workers, **options):
            if isinstance(chunk, str):
                raise DataError(chunk)
            yield chunk

    def _places(self) -> Iterator[Place]:
        """Where each batch begins, from the present place on."""
        epoch, row = self._epoch, self._row
        while True:
            if row + self.batch_size > self.num_rows:
                epoch, row = epoch + 1, 0
            yield epoch, row
            row += self.batch_size

    def _chunks(self, places: Iterator[Place], skip: int = 0, stride: int = 1) -> Iterator[Chunk]:
        """Several batches at a time, one behind the other; of ``stride`` such chunks only each ``skip``-th."""
        meta, share = self.reader.meta, self.batch_size // self.world_size
        size = min(_CHUNK_BATCHES, max(1, _CHUNK_BYTES // (share * (4 * meta["d"] + 8 * meta["seq_len"]))))
        number = 0
        while chunk := list(islice(places, size)):
            if number % stride == skip:
                spans = [(epoch, row + self.rank * share, row + (self.rank + 1) * share) for epoch, row in chunk]
                yield chunk, _finish(_join([part for span in _merged(spans) for part in self._read(*span)]))
            number += 1

    def _read(self, epoch: int, first: int, last: int) -> list[Columns]:
        if len(self.readers) == 1:
            return self._windows[0].rows(epoch, first, last)
        source, before = self._mixture.deal(self.seed, epoch, first, last)
        places = [np.flatnonzero(source == number) for number in range(len(self.readers))]
        parts = []
        for number, (windows, start) in enumerate(zip(self._windows, before, strict=True)):
            for part in windows.rows(epoch, int(start), int(start) + len(places[number])):
                layer = torch.full_like(part["position"], self.readers[number].meta["layer"])
                changed = {"activation": part["activation"].float(), "sample_id": part["sample_id"] + int(self._first_id[number])}
                parts.append({**part, **changed, "layer": layer})
        return [{**_take(_join(parts), np.argsort(np.concatenate(places))), "source": torch.from_numpy(source)}]

    # ---------------------------------------------------------------------------------------------- by number, and all

    @property
    def reader(self) -> Reader:
        """The first dump's."""
        return self.readers[0]

    @property
    def statistics(self) -> ActivationStatistics:
        """Of the activations of an epoch, each dump by its share."""
        return ActivationStatistics.mixed([reader.statistics for reader in self.readers], self._mixture.shares)

    def rows(self, indices: Tensor | np.ndarray | Sequence[int]) -> Batch:
        """Exactly these rows of the first dump (``sample_id``), in this order; for evaluation."""
        row_N = np.asarray(indices, dtype=np.int64)
        if not len(row_N):
            return cast(Batch, _finish(_take(self.reader.read_batch(0), row_N)))
        first_row = np.concatenate([[0], np.cumsum(self.reader.batch_rows)])
        owner = np.searchsorted(first_row, row_N, side="right") - 1
        parts, places = [], []
        for index in np.unique(owner):
            wanted = np.flatnonzero(owner == index)
            parts.append(_take(self.reader.read_batch(index), row_N[wanted] - first_row[index]))
            places.append(wanted)
        return cast(Batch, _finish(_take(_join(parts), np.argsort(np.concatenate(places)))))

    def documents(self) -> Tensor:
        """``doc_id`` of every row of the first dump, int64."""
        return torch.from_numpy(self.reader.column("doc_id").astype(np.int64))

    def _check(self, shares: dict) -> None:
        if self.batch_size % self.world_size:
            raise DataError(
                f"batch_size={self.batch_size} cannot be shared evenly by {self.world_size} processes; "
                f"make it a multiple of {self.world_size}"
            )
        for folder, share in shares.items():
            if not share > 0:
                raise DataError(f"the share of {folder} in the mixture is {share}; it must be greater than 0")
        first = self.readers[0].meta
        for reader in self.readers[1:]:
            for key in ("d", "seq_len"):
                if reader.meta[key] != first[key]:
                    raise DataError(f"{reader.folder} cannot be mixed with {self.reader.folder}: {key} {reader.meta[key]}, {first[key]}")
            reader.check_matches({key: first.get(key) for key in ("subject", "tokenizer")})


def _leave_signals(_worker: int) -> None:
    """A stop signal for all of a training's processes is the training's matter: it still needs its workers for the step it is in."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Chunks(IterableDataset):
    """A loader's chunks, those of this worker; an error comes as its message."""

    def __init__(self, loader: ActivationLoader):
        self._loader = loader

    def __iter__(self) -> Iterator[Chunk | str]:
        worker = get_worker_info()
        skip, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            yield from self._loader._chunks(self._loader._places(), skip, stride)
        except DataError as error:
            yield str(error)


class _Windows:
    """The windows of one dump, one of them in memory."""

    def __init__(self, reader: Reader, seed: int, number: int, window_bytes: int):
        self.size = max(1, window_bytes // window_bytes_of(reader.meta, 1))
        self._reader, self._order = reader, FolderOrder(reader.batch_rows, self.size, seed, number)
        self._held = (-1, -1)
        self._window: Columns = {}

    def rows(self, epoch: int, first: int, last: int) -> list[Columns]:
        """Rows ``first`` to ``last`` of an epoch's order, piece by piece; copies, as the next window is written over this one."""
        parts = []
        for number, start, stop in self._order.pieces(epoch, first, last):
            if (epoch, number) != self._held:
                self._held = (-1, -1)
                self._read(epoch, number)
                self._held = (epoch, number)
            parts.append({name: value[start:stop].clone() for name, value in self._window.items()})
        return parts

    def emptied(self) -> _Windows:
        """The same without the window in memory; what a worker process is sent."""
        copy = object.__new__(_Windows)
        copy.__dict__ = {**self.__dict__, "_held": (-1, -1), "_window": {}}
        return copy

    def _read(self, epoch: int, number: int) -> None:
        batches, places = self._order.window(epoch, number)

        def fill(i: int) -> None:
            for name, value in self._reader.read_batch(batches[i]).items():
                _bits(self._window[name])[places[i]] = _bits(value)

        if not self._window:
            first = self._reader.read_batch(batches[0])
            self._window = {name: value.new_empty(self._order.largest_window, *value.shape[1:]) for name, value in first.items()}
        with ThreadPoolExecutor(_DECODERS) as pool:
            for _ in pool.map(fill, np.argsort(batches)):  # as they lie in the shards
                pass


def window_bytes_of(meta: dict, batches: int) -> int:
    """Memory that so many record batches of a dump take in a window, bytes."""
    row_bytes = meta["d"] * encoding_of(meta["encoding"]).decoded.itemsize + 4 * meta["seq_len"] + meta.get("text_bytes", 0)
    return row_bytes * meta["rows_per_batch"] * batches


def _merged(spans: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Spans (epoch, first, last) with those put together that follow one another."""
    epoch, first, last = spans[0]
    for span in spans[1:]:
        if span[:2] != (epoch, last):
            yield epoch, first, last
            epoch, first = span[:2]
        last = span[2]
    yield epoch, first, last


def _bits(values: Tensor) -> np.ndarray:
    """A tensor's memory as numpy, which moves rows several times faster."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def _next_pinned(source: Iterator[Chunk]) -> Chunk:
    places, rows = next(source)
    return places, {name: value.pin_memory() for name, value in rows.items()} if torch.cuda.is_available() else rows


def _take(rows: Columns, index: np.ndarray) -> Columns:
    taken = torch.from_numpy(index)
    return {name: value[taken] for name, value in rows.items()}


def _join(parts: list[Columns]) -> Columns:
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _finish(rows: Columns) -> Columns:
    floats = {"activation": rows["activation"].float()} if "activation" in rows else {}
    return {**rows, **floats, **{name: rows[name].long() for name in ("input_ids", "text_ids") if name in rows}}
