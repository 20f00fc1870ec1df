"""The activation shards: a folder of Arrow files and one ``meta.json``. ``docs/format.md`` describes both for other languages.

A folder is written by any number of processes (:class:`ShardWriter`), each shard by one of them, and read record batch by record batch
(:class:`ShardReader`). A shard, and the record of it, gets its name when it is complete; ``meta.json`` comes last, and with it goes
``<folder>/.work``, where unfinished files, the records of finished shards and the locks lie.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from megalens.data import DataError
from megalens.data.encoding import activation_fields, decode_activation, encode_activation
from megalens.data.moments import Moments
from megalens.files import Folder, Lock, new_file

FORMAT = "megalens-activations"
VERSION = 1
REDUMP = "make it anew: python tools/dump_acts.py config=... force_redump=true"
_OPEN_SHARDS = 64


# ------------------------------------------------------------------------------------------------------------ meta.json


def render_meta(meta: dict) -> str:
    """``meta.json``: one key per line, the last one the xxh3_64 of the text without it."""
    return _lines({**meta, "checksum": xxhash.xxh3_64_hexdigest(_lines(meta).encode())})


def _lines(meta: dict) -> str:
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items()) + "\n}\n"


def read_meta(folder: str | Path) -> dict:
    """``meta.json`` of a finished folder, checked against its own checksum.

    Raises:
        DataError: there is none, it is damaged, or of another format.
    """
    files = Folder(folder)
    path = files.path("meta.json")
    if files.size("meta.json") is None:
        state = f"the dump in {folder} is not finished" if files.exists(".work") else f"there is no dump in {folder}"
        raise DataError(f"{state}; make it with: python tools/dump_acts.py config=...")
    try:
        text = files.read("meta.json").decode()
        meta = json.loads(text)
        intact = isinstance(meta, dict) and meta.pop("checksum", None) is not None and render_meta(meta) == text
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{path} does not match its checksum: it is damaged; {REDUMP}")
    if (meta.get("format"), meta.get("format_version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} is of format {meta.get('format')} version {meta.get('format_version')}, not {FORMAT} version {VERSION}; {REDUMP}"
        )
    return meta


# -------------------------------------------------------------------------------------------------------------- writing


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"shard-{index:05d}.arrow"


class ShardWriter:
    """One folder being written; processes share it through files alone.

    Args:
        folder: the dump's folder.
        header: everything of ``meta.json`` that is known beforehand. It must hold ``d``, ``layer``, ``encoding``, ``token_type``
            (``uint16`` or ``int32``), ``seq_len``, ``rows``, ``rows_per_shard`` and ``rows_per_batch``. Writers with equal headers work
            on one dump.
    """

    def __init__(self, folder: str | Path, header: dict):
        self.folder, self.work = Path(folder), Path(folder) / ".work"
        self.header = {"format": FORMAT, "format_version": VERSION, **header}
        self.schema = _schema(self.header)
        self._scale_D: np.ndarray | None = None

    @property
    def num_shards(self) -> int:
        """Shards of the finished folder."""
        return -(-self.header["rows"] // self.header["rows_per_shard"])

    def shard_rows(self, index: int) -> range:
        """The rows (``sample_id``) of shard ``index``."""
        first = index * self.header["rows_per_shard"]
        return range(first, min(first + self.header["rows_per_shard"], self.header["rows"]))

    def begin(self) -> str | None:
        """Join or start the work. What an unfinished dump with another header left is removed; a finished one stays (see :func:`discard`).

        Returns:
            why something was removed, or None.
        """
        plan = _lines(self.header)
        with _folder_lock(self.folder):
            path = self.work / "plan.json"
            if (self.folder / "meta.json").exists() or (path.exists() and path.read_text() == plan):
                return None
            found = _leftovers(self.folder)
            _remove(found)
            with new_file(path) as file:
                file.write(plan.encode())
        return f"an unfinished dump with other settings was in {self.folder} and is discarded" if found else None

    def claim(self, index: int, wait: bool) -> Lock | None:
        """The right to write shard ``index``, until its lock is released or this process dies; None: it is written or another one's."""
        lock = Lock(self.work / f"{index:05d}.lock")
        if self.is_written(index):
            return None
        try:
            if not lock.acquire(wait):
                return None
        except FileNotFoundError:  # the whole dump was finished meanwhile
            return None
        if self.is_written(index):
            lock.release()
            return None
        return lock

    def calibrate(self, read: Callable[[], Tensor]) -> None:
        """For ``int8``: agree with all other writers on the scale of each dimension; to be called before :meth:`write`.

        Args:
            read: gives activations ``[N, d]``; called by the first writer alone. The scale is their standard deviation.
        """
        if self.header["encoding"] != "int8" or self._scale_D is not None:
            return
        path = self.work / "scale.json"
        try:
            with Lock(self.work / "scale.lock"):
                if not path.exists():
                    deviation_D = read().float().cpu().double().numpy().std(0)
                    scale_D = np.where(deviation_D > 0, deviation_D, 1).astype(np.float32)
                    with new_file(path) as file:
                        file.write(json.dumps(scale_D.tolist()).encode())
                self._scale_D = np.array(json.loads(path.read_text()), np.float32)
        except FileNotFoundError:  # the whole dump was finished meanwhile
            return

    def is_written(self, index: int) -> bool:
        """Is shard ``index`` complete?"""
        return (self.work / f"{index:05d}.json").exists() or (self.folder / "meta.json").exists()

    def rows_written(self) -> int:
        """Rows of all complete shards."""
        if (self.folder / "meta.json").exists():
            return self.header["rows"]
        return sum(len(self.shard_rows(int(path.stem))) for path in self.work.glob("[0-9]*.json"))

    def bytes_written(self) -> int:
        """Bytes of all complete shards."""
        return sum(path.stat().st_size for path in self.folder.glob("shard-*.arrow"))

    def write(self, index: int, rows: dict[str, Tensor]) -> None:
        """Write shard ``index``, then the record that says it is complete.

        Args:
            index: which one.
            rows: ``activation [N, d]``, ``input_ids [N, C]`` (tokens 0 to ``position`` are kept), ``position [N]``, ``doc_id [N]``; N is
                that of :meth:`shard_rows`.

        Raises:
            DataError: an activation is not finite, or the disk is full.
        """
        numbers, moments, lost = self.shard_rows(index), None, np.zeros(2)
        if len(rows["activation"]) != len(numbers):
            raise ValueError(f"shard {index} holds {len(numbers)} rows, not {len(rows['activation'])}")
        with new_file(self.folder / shard_name(index), self.work) as file:
            options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
            with pa.PythonFile(file, "w") as sink, pa.ipc.new_file(sink, self.schema, options=options) as writer:
                for first in range(0, len(numbers), self.header["rows_per_batch"]):
                    part = {name: value[first : first + self.header["rows_per_batch"]] for name, value in rows.items()}
                    if not part["activation"].to(_kept_precision(self.header["encoding"])).isfinite().all():
                        raise DataError(f"activations of layer {self.header['layer']} hold NaN or infinity; try dtype=fp32")
                    record = _encode(part, numbers[first], self.header, self.schema, self._scale_D)
                    writer.write_batch(record)
                    stored = decode_activation(record, self.header["encoding"], self._scale_D)
                    if self._scale_D is not None:
                        error_ND = (stored - part["activation"].float()).double().numpy()
                        lost += [(error_ND**2).sum(), ((error_ND / self._scale_D) ** 2).sum()]
                    moments = Moments.of(stored) if moments is None else moments + Moments.of(stored)
        record = {"file": shard_name(index), "rows": len(numbers), "bytes": file.bytes, "checksum": file.checksum}
        with new_file(self.work / f"{index:05d}.json") as file:
            file.write(json.dumps({"shard": record, "moments": moments.to_json(), "lost": lost.tolist()}).encode())

    def finish(self) -> bool:
        """Write ``meta.json`` if every shard is written; False if one is missing."""
        if not all(self.is_written(i) for i in range(self.num_shards)):
            return False
        with _folder_lock(self.folder):
            if not (self.folder / "meta.json").exists():
                records = [json.loads((self.work / f"{i:05d}.json").read_text()) for i in range(self.num_shards)]
                moments = Moments.from_json(records[0]["moments"])
                for record in records[1:]:
                    moments = moments + Moments.from_json(record["moments"])
                meta = {**self.header, "shards": [record["shard"] for record in records], **moments.summary()}
                if self.header["encoding"] == "int8":
                    lost, scale = sum(np.array(record["lost"]) for record in records), json.loads((self.work / "scale.json").read_text())
                    raw, scaled = sum(meta["variance"]), sum(np.array(meta["variance"]) / np.array(scale) ** 2)
                    losses = (lost / (meta["rows"] * np.maximum([raw, scaled], np.finfo(float).tiny))).tolist()
                    meta |= {"int8_scale": scale, "fve_loss": losses[0], "fve_std_loss": losses[1]}
                with new_file(self.folder / "meta.json", self.work) as file:
                    file.write(render_meta(meta).encode())
            shutil.rmtree(self.work, ignore_errors=True)
        return True


def discard(folder: str | Path, older_than: float) -> None:
    """Remove a finished dump, ``meta.json`` first, so that a valid one is never half there.

    Args:
        folder: the dump's folder.
        older_than: seconds since the epoch; a dump finished later (by another rank of the same command) stays.
    """
    folder = Path(folder)
    with _folder_lock(folder):
        meta = folder / "meta.json"
        if meta.exists() and meta.stat().st_mtime < older_than:
            _remove([meta, *_leftovers(folder)])


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    lock = Lock(folder / ".work" / "lock")
    while True:
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(wait=True)
            break
        except FileNotFoundError:  # another process finished the dump and removed the folder of its work
            continue
    try:
        yield
    finally:
        lock.release()


def _leftovers(folder: Path) -> list[Path]:
    """What a writer may have left, but for the locks."""
    return sorted(folder.glob("shard-*.arrow")) + sorted(p for p in (folder / ".work").glob("*") if not p.name.endswith("lock"))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _schema(header: dict) -> pa.Schema:
    tokens = {"uint16": pa.uint16(), "int32": pa.int32()}[header["token_type"]]
    fields = [
        *activation_fields(header["encoding"], header["d"]),
        pa.field("input_ids", pa.list_(tokens), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("sample_id", pa.int64(), nullable=False),
    ]
    return pa.schema(fields, metadata={"format": FORMAT, "format_version": str(VERSION)})


def _kept_precision(encoding: str) -> torch.dtype:
    return torch.bfloat16 if encoding.startswith("bf16") else torch.float32


def _encode(rows: dict[str, Tensor], first: int, header: dict, schema: pa.Schema, scale_D: np.ndarray | None) -> pa.RecordBatch:
    count, position_N = len(rows["position"]), rows["position"].numpy()
    ids_NC = rows["input_ids"].numpy()
    tokens = ids_NC[np.arange(ids_NC.shape[1]) <= position_N[:, None]].astype(header["token_type"])
    offsets = np.concatenate([[0], np.cumsum(position_N + 1)]).astype(np.int32)
    columns = [
        *encode_activation(rows["activation"], header["encoding"], scale_D),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
        pa.array(position_N.astype(np.int32)),
        pa.array(np.full(count, header["layer"], np.int32)),
        pa.array(rows["doc_id"].numpy().astype(np.int64)),
        pa.array(np.arange(first, first + count, dtype=np.int64)),
    ]
    columns = [column.cast(field.type) if column.type != field.type else column for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


# -------------------------------------------------------------------------------------------------------------- reading


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
        mean, var, mean_normalised: of the whole folder, float32 ``[d]`` (the last: of the unit-length activations).

    Raises:
        DataError: no finished dump there, or ``meta.json`` is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder
        self.meta = read_meta(folder)
        self.identity = hashlib.sha256(json.dumps(self.meta["shards"]).encode()).hexdigest()[:16]
        per_shard = [_batch_rows(shard["rows"], self.meta["rows_per_batch"]) for shard in self.meta["shards"]]
        self.batch_rows = np.concatenate(per_shard)
        self._place = [(shard, batch) for shard, rows in enumerate(per_shard) for batch in range(len(rows))]
        self.mean, self.var, self.mean_normalised = (
            torch.tensor(self.meta[name], dtype=torch.float64).float() for name in ("mean", "variance", "mean_normalised")
        )
        self._scale_D = np.array(self.meta["int8_scale"], np.float32) if self.meta["encoding"] == "int8" else None
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
        with self._lock:
            file, pages = self._shard(shard)
            record = file.get_batch(batch)
        position_N = record["position"].to_numpy().astype(np.int64)
        ids_NC = np.zeros((len(record), self.meta["seq_len"]), np.int32)
        ids_NC[np.arange(ids_NC.shape[1]) <= position_N[:, None]] = record["input_ids"].flatten().to_numpy()
        rows = {
            "activation": decode_activation(record, self.meta["encoding"], self._scale_D),
            "input_ids": torch.from_numpy(ids_NC),
            "position": torch.from_numpy(position_N),
            "doc_id": torch.tensor(record["doc_id"].to_numpy()),
            "sample_id": torch.tensor(record["sample_id"].to_numpy()),
        }
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)
        return rows

    def column(self, name: str) -> np.ndarray:
        """One number per row (``doc_id``, ``position``, ``sample_id``), all rows, nothing else decompressed."""
        parts = []
        for shard in range(len(self.meta["shards"])):
            with self._lock:
                schema = self._shard(shard)[0].schema
                options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name)])
                with self._files.open(self._file(shard)) as source:
                    parts.append(pa.ipc.open_file(source, options=options).read_all()[name].to_numpy())
        return np.concatenate(parts)

    def check_matches(
        self,
        *,
        subject_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
        layer: int | None = None,
        d: int | None = None,
    ) -> None:
        """Refuse a dump made with another model, tokenizer or layer. What is None is not compared.

        Raises:
            DataError: naming what differs.
        """
        found = (self.meta["subject"]["fingerprint"], self.meta["tokenizer"]["fingerprint"], self.meta["layer"], self.meta["d"])
        wanted = (subject_fingerprint, tokenizer_fingerprint, layer, d)
        names = (f"the weights of {self.meta['subject']['name']}", f"the tokenizer of {self.meta['tokenizer']['name']}", "layer", "width")
        for name, have, want in zip(names, found, wanted, strict=True):
            if want is not None and have != want:
                raise DataError(f"the dump in {self.folder} is of {name} ({have}), not of this configuration's ({want}); {REDUMP}")

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
        self._open[shard] = pa.ipc.open_file(file), pages
        return self._open[shard]


def _batch_rows(rows: int, per_batch: int) -> np.ndarray:
    return np.minimum(per_batch, rows - np.arange(0, rows, per_batch, dtype=np.int64))


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
    problems += [f"{files.path(name)} belongs to no shard of meta.json" for name in strange]
    if sum(record["rows"] for record in meta["shards"]) != meta["rows"]:
        problems.append(f"{folder}: the shards' rows do not add up to meta.json's {meta['rows']}")
    return problems
