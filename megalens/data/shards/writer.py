"""Writing a dump. Any number of processes write one folder, each shard by one of them; they share it through files alone.

A shard, and the record of it, gets its name when it is complete. ``meta.json`` comes last; then ``<folder>/.work`` is removed, where
unfinished files, the records of finished shards and the locks lie.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from megalens.data import DataError
from megalens.data.encoding import encoding_of
from megalens.data.moments import Moments
from megalens.data.shards.meta import FORMAT, VERSION, one_key_per_line, render_meta
from megalens.data.shards.rows import encode_rows, schema_of
from megalens.files import Lock, new_file


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
        self.folder, self.work, self._meta = Path(folder), Path(folder) / ".work", Path(folder) / "meta.json"
        self.header = {"format": FORMAT, "format_version": VERSION, **header}
        self.encoding = encoding_of(header["encoding"])
        self.schema = schema_of(self.header)
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
        header = one_key_per_line(self.header)
        with _folder_lock(self.folder):
            path = self.work / "header.json"
            if self._meta.exists() or (path.exists() and path.read_text() == header):
                return None
            found = _leftovers(self.folder)
            _remove(found)
            with new_file(path) as file:
                file.write(header.encode())
        return f"an unfinished dump of other settings or another version was in {self.folder} and is discarded" if found else None

    def claim(self, index: int) -> Lock | None:
        """The right to write shard ``index``, until its lock is released or this process dies; None: it is written or another one's."""
        lock = Lock(self.work / f"{index:05d}.lock")
        if self.is_written(index):
            return None
        try:
            if not lock.acquire(wait=False):
                return None
        except FileNotFoundError:  # the whole dump was finished meanwhile
            return None
        if self.is_written(index):
            lock.release()
            return None
        return lock

    def needs_scale(self) -> bool:
        """Must :meth:`calibrate` be called before :meth:`write`? So it is for encodings with a scale, until some process has."""
        return self.encoding.scaled and self._scale_D is None and not any(map(Path.exists, (self.work / "scale.json", self._meta)))

    def calibrate(self, activation_ND: Tensor) -> None:
        """For encodings with a scale: set that of each dimension, the standard deviation of some activations.

        Where another process has set one, that one holds.
        """
        if not self.encoding.scaled:
            return
        path = self.work / "scale.json"
        try:
            with Lock(self.work / "scale.lock"):
                if not path.exists():
                    deviation_D = activation_ND.float().cpu().double().numpy().std(0)
                    scale_D = np.where(deviation_D > 0, deviation_D, 1).astype(np.float32)
                    with new_file(path) as file:
                        file.write(json.dumps(scale_D.tolist()).encode())
        except FileNotFoundError:  # the whole dump was finished meanwhile
            return

    def is_written(self, index: int) -> bool:
        """Is shard ``index`` complete?"""
        return (self.work / f"{index:05d}.json").exists() or self._meta.exists()

    def rows_written(self) -> int:
        """Rows of all complete shards."""
        if self._meta.exists():
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
        if self.encoding.scaled and self._scale_D is None:
            self._scale_D = np.array(json.loads((self.work / "scale.json").read_text()), np.float32)
        if len(rows["activation"]) != len(numbers):
            raise ValueError(f"shard {index} holds {len(numbers)} rows, not {len(rows['activation'])}")
        with new_file(self.folder / shard_name(index), self.work) as file:
            options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
            with pa.PythonFile(file, "w") as sink, pa.ipc.new_file(sink, self.schema, options=options) as writer:
                for first in range(0, len(numbers), self.header["rows_per_batch"]):
                    part = {name: value[first : first + self.header["rows_per_batch"]] for name, value in rows.items()}
                    if not part["activation"].to(self.encoding.decoded).isfinite().all():
                        raise DataError(f"activations of layer {self.header['layer']} hold NaN or infinity; try dtype=fp32")
                    record = encode_rows(part, numbers[first], self.header, self.schema, self._scale_D)
                    writer.write_batch(record)
                    stored = self.encoding.decode(record, self._scale_D)
                    if self._scale_D is not None:
                        error_ND = (stored - part["activation"].float()).double().numpy()
                        lost += [(error_ND**2).sum(), ((error_ND / self._scale_D) ** 2).sum()]
                    moments = Moments.of(stored) if moments is None else moments + Moments.of(stored)
        if moments is None:
            raise ValueError(f"shard {index} holds no rows")
        record = {"file": shard_name(index), "rows": len(numbers), "bytes": file.bytes, "checksum": file.checksum}
        with new_file(self.work / f"{index:05d}.json") as file:
            file.write(json.dumps({"shard": record, "moments": moments.to_json(), "lost": lost.tolist()}).encode())

    def finish(self) -> bool:
        """Write ``meta.json`` if every shard is written; False if one is missing."""
        if not all(self.is_written(i) for i in range(self.num_shards)):
            return False
        with _folder_lock(self.folder):
            if not self._meta.exists():
                records = [json.loads((self.work / f"{i:05d}.json").read_text()) for i in range(self.num_shards)]
                scale = json.loads((self.work / "scale.json").read_text()) if self.encoding.scaled else None
                meta = {**self.header, **_summary(records, scale)}
                with new_file(self._meta, self.work) as file:
                    file.write(render_meta(meta).encode())
            shutil.rmtree(self.work, ignore_errors=True)
        return True


def _summary(records: list[dict], scale: list[float] | None) -> dict:
    """What ``meta.json`` adds to the header: the shards, the statistics, and, of an encoding with a scale, what rounding cost."""
    moments = Moments.from_json(records[0]["moments"])
    for record in records[1:]:
        moments = moments + Moments.from_json(record["moments"])
    found = {"shards": [record["shard"] for record in records], **moments.statistics().to_meta()}
    if scale is None:
        return found
    variance_D, lost = np.array(found["variance"]), sum(np.array(record["lost"]) for record in records)
    raw, scaled = sum(variance_D), sum(variance_D / np.array(scale) ** 2)
    losses = (lost / (moments.count * np.maximum([raw, scaled], np.finfo(float).tiny))).tolist()
    return found | {"int8_scale": scale, "fve_loss": losses[0], "fve_std_loss": losses[1]}


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
