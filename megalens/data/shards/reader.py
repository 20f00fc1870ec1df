"""Reading a finished dump, record batch by record batch; and finding what is wrong with one."""

from __future__ import annotations

import hashlib
import json
import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from megalens.data import DataError
from megalens.data.encoding import encoding_of
from megalens.data.identity import first_difference
from megalens.data.shards.meta import REDUMP, read_meta
from megalens.data.shards.rows import batch_sizes, decode_rows, schema_of
from megalens.files import Folder
from megalens.statistics import ActivationStatistics

_OPEN_SHARDS = 64


class ShardReader:
    """A finished folder; a shard's checksum is verified when it is first touched.

    Local shards are memory-mapped, others are read. A record batch's pages are given back as soon as its rows are decoded: they would
    stay resident, and memory would grow with the dump.

    Args:
        folder: the dump's folder: a path, or anything ``fsspec`` opens (``s3://...``; ``filecache::s3://...`` keeps a local copy).

    Attributes:
        meta: the contents of ``meta.json``.
        identity: a hash of the rows it holds.
        batch_rows: rows of each record batch, over all shards in order, int64.
        statistics: of the whole folder's activations.

    Raises:
        DataError: no finished dump there, or ``meta.json`` is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder
        self.meta = read_meta(folder)
        self.identity = hashlib.sha256(json.dumps(self.meta["shards"]).encode()).hexdigest()[:16]
        per_shard = [batch_sizes(shard["rows"], self.meta["rows_per_batch"]) for shard in self.meta["shards"]]
        self.batch_rows = np.concatenate(per_shard)
        self._place = [(shard, batch) for shard, rows in enumerate(per_shard) for batch in range(len(rows))]
        self.statistics = ActivationStatistics.from_meta(self.meta)
        self._scale_D = np.array(self.meta["int8_scale"], np.float32) if encoding_of(self.meta["encoding"]).scaled else None
        self._verified: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self._files = Folder(self.folder)
        self._open: OrderedDict[int, tuple[pa.ipc.RecordBatchFileReader, mmap.mmap | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_open", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self.meta["rows"]

    def read_batch(self, index: int) -> dict[str, Tensor]:
        """Record batch ``index`` (counted over all shards).

        Returns:
            ``activation [N, d]`` in the stored precision (bfloat16 or float32), ``input_ids [N, seq_len]`` int32, 0 behind ``position``,
            ``position``, ``doc_id``, ``sample_id`` ``[N]`` int64.

        Raises:
            DataError: the shard is missing or damaged.
        """
        shard, batch = self._place[index]
        with self._lock, self._reading(shard):
            file, pages = self._shard(shard)
            record = file.get_batch(batch)
        with self._reading(shard):
            rows = decode_rows(record, self.meta, self._scale_D, int(self.batch_rows[index]))
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)
        return rows

    def column(self, name: str) -> np.ndarray:
        """One number per row (``doc_id``, ``position``, ``sample_id``), all rows, nothing else decompressed."""
        parts = []
        for shard in range(len(self.meta["shards"])):
            with self._lock, self._reading(shard):
                schema = self._shard(shard)[0].schema
                options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)])
                with self._files.open(self._file(shard)) as source:
                    parts.append(pa.ipc.open_file(source, options=options).read_all()[name].to_numpy())
        return np.concatenate(parts)

    def check_matches(self, wanted: dict) -> None:
        """Refuse a dump made with another model, tokenizer or layer.

        Args:
            wanted: what it must be of: :func:`~megalens.data.identity.model_identity`, or other keys of ``meta.json``.

        Raises:
            DataError: naming the first key that differs.
        """
        if difference := first_difference(self.meta, wanted):
            raise DataError(f"the dump in {self.folder} is of {difference}; {REDUMP}")

    @contextmanager
    def _reading(self, shard: int) -> Iterator[None]:
        """Turn what Arrow raises into an error that names the shard: its bytes are those that were checked, but no such rows."""
        try:
            yield
        except (pa.ArrowException, IndexError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"shard {self._files.path(self._file(shard))} cannot be read: {reason}; {REDUMP}") from None

    def _file(self, shard: int) -> str:
        return self.meta["shards"][shard]["file"]

    def _shard(self, shard: int) -> tuple[pa.ipc.RecordBatchFileReader, mmap.mmap | None]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard not in self._verified:
            if problem := _problem(self._files, self.meta["shards"][shard]):
                raise DataError(f"{problem}; {REDUMP}")
            self._verified.add(shard)
        while len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)
        pages = self._files.map(self._file(shard))
        file = self._files.open(self._file(shard)) if pages is None else pa.py_buffer(pages)
        opened = pa.ipc.open_file(file)
        self._check_rows(shard, opened)
        self._open[shard] = opened, pages
        return self._open[shard]

    def _check_rows(self, shard: int, opened: pa.ipc.RecordBatchFileReader) -> None:
        """Refuse a shard whose columns or record batches are not what ``meta.json`` says."""
        batches = -(-self.meta["shards"][shard]["rows"] // self.meta["rows_per_batch"])
        found, wanted = ({field.name: _plain(field.type) for field in schema} for schema in (opened.schema, schema_of(self.meta)))
        if other := next((name for name, kind in wanted.items() if found.get(name) != kind), None):
            what = f"has no column {other} of type {wanted[other]}"
        elif opened.num_record_batches != batches:
            what = f"has {opened.num_record_batches} record batches instead of {batches}"
        else:
            return
        raise DataError(f"shard {self._files.path(self._file(shard))} {what}: it is not of this dump; {REDUMP}")


def _plain(kind: pa.DataType) -> str:
    """A type as text, whether or not a value may be null (no value is)."""
    return str(kind).replace(" not null", "")


def file_problem(files: Folder, record: dict) -> str | None:
    """What is wrong with a shard's file at first sight, or None; ``record`` is its entry in ``meta.json``."""
    path, size = files.path(record["file"]), files.size(record["file"])
    if size is None:
        return f"shard {path} is missing"
    if size != record["bytes"]:
        return f"shard {path} has {size} bytes instead of {record['bytes']}: it is cut short or not of this dump"
    return None


def _problem(files: Folder, record: dict) -> str | None:
    """What is wrong with a shard's file, or None."""
    if problem := file_problem(files, record):
        return problem
    if files.checksum(record["file"]) != record["checksum"]:
        return f"shard {files.path(record['file'])} does not match its checksum: it is damaged or not of this dump"
    return None


def verify(folder: str | Path) -> list[str]:
    """Everything that is wrong with a folder, one line each; empty: nothing is."""
    try:
        meta = read_meta(folder)
    except DataError as error:
        return [str(error)]
    files = Folder(folder)
    problems = [p for record in meta["shards"] if (p := _problem(files, record))]
    known = {record["file"] for record in meta["shards"]}
    strange = [name for name in files.names() if name.endswith(".arrow") and name not in known]
    return problems + [f"{files.path(name)} belongs to no shard of meta.json" for name in strange]
