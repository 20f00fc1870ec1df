"""Given texts: a file with one or more texts for activations of a dump, joined to the dump's rows.

The file is read once. Its texts are tokenised and kept, sorted by the dump's rows, in a folder under ``pretokenize.root``; memory holds 24
bytes of each text then. :class:`TextReader` gives a dump's rows with their texts, each row as often as it has texts, in the place of a
:class:`~megalens.data.shards.ShardReader`: so the order, the ranks, the workers and a resume are the loader's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megalens.config import Config
from megalens.data import DataError
from megalens.families.loading import load_tokenizer, tokenizer_fingerprint
from megalens.files import Lock, checksum, save_json
from megalens.lens.frame import Frame

_CHUNK = 1024
_VERSION = 1


class Record(NamedTuple):
    """A row of a file of texts, and where it stands, for messages."""

    where: str
    fields: dict[str, Any]


def read_records(path: Path, columns: set[str] | None = None) -> Iterator[Record]:
    """The rows of a .jsonl or .parquet file, one by one.

    Args:
        columns: those to read of a parquet file, where it has them; None: all.

    Raises:
        DataError: there is no such file, it is of another kind, or a row cannot be read.
    """
    if not path.is_file():
        raise DataError(f"given.path={path}: there is no such file; megalens write-texts makes one")
    if path.suffix == ".parquet":
        yield from _parquet(path, columns)
    elif path.suffix in (".jsonl", ".json"):
        yield from _lines(path)
    else:
        raise DataError(f"given.path={path} must be a .jsonl or a .parquet file")


def _parquet(path: Path, columns: set[str] | None) -> Iterator[Record]:
    try:
        with pa.parquet.ParquetFile(path) as file:
            chosen = [name for name in file.schema_arrow.names if columns is None or name in columns]
            number = 0
            for batch in file.iter_batches(_CHUNK, columns=chosen):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", fields)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise DataError(f'{path}, line {number}: a line must be an object, e.g. {{"sample_id": 0, "text": "..."}}')
                    yield Record(f"{path}, line {number}", fields)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as JSON lines, at or behind line {number}: {error}") from None


class _Rows:
    """Finds the rows of a dump by number, or by document and position."""

    def __init__(self, reader: Any):
        self.doc_id_N, self.position_N = (_column(reader, name) for name in ("doc_id", "position"))
        self._docs, dense_N = np.unique(self.doc_id_N, return_inverse=True)
        self._base = int(self.position_N.max(initial=0)) + 1
        key_N = dense_N * self._base + self.position_N
        self._order = np.argsort(key_N, kind="stable")
        self._sorted = key_N[self._order]

    def find(self, record: Record) -> int:
        """The row of a record; -1: none.

        Raises:
            DataError: the record names no row, or its number is that of another document or position.
        """
        where, fields = record
        numbers = {name: _whole_number(fields.get(name), where, name) for name in ("sample_id", "doc_id", "position")}
        row, doc, position = numbers.values()
        if row is None:
            if doc is None or position is None:
                raise DataError(f"{where}: a text needs the column sample_id, or doc_id and position, to say which row it is of")
            return self._by_place(doc, position)
        if not 0 <= row < len(self.doc_id_N):
            return -1
        for name, given, here in (("doc_id", doc, self.doc_id_N[row]), ("position", position, self.position_N[row])):
            if given is not None and given != here:
                raise DataError(f"{where}: sample_id {row} has {name} {given} there and {here} in the dump: the texts are of another dump")
        return row

    def _by_place(self, doc: int, position: int) -> int:
        dense = int(np.searchsorted(self._docs, doc))
        if dense == len(self._docs) or self._docs[dense] != doc or not 0 <= position < self._base:
            return -1
        key = dense * self._base + position
        at = int(np.searchsorted(self._sorted, key))
        return int(self._order[at]) if at < len(self._sorted) and self._sorted[at] == key else -1


def _whole_number(value: Any, where: str, name: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise DataError(f"{where}: {name} is {value!r:.40}; it must be a whole number")


def _column(reader: Any, name: str) -> np.ndarray:
    if hasattr(reader, "column"):
        return reader.column(name).astype(np.int64)
    return np.concatenate([reader.read_batch(i)[name].numpy() for i in range(len(reader.batch_rows))]).astype(np.int64)


# ------------------------------------------------------------------------------------------------------------ the store


class Store:
    """Tokenised texts in a folder, sorted by row.

    Attributes:
        meta: how many texts and rows there are, and what was left out.
        row_N, start_N, length_N: of each text, in the order of the rows: its row, where its tokens begin, how many there are.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.row_N, self.start_N, self.length_N = np.load(folder / "index.npy")
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def tokens(self, name: str, dtype: Any) -> np.ndarray:
        """The flat ``ids`` or ``weights`` of all texts, memory-mapped."""
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / f"{name}.bin", dtype, mode="r")
        return self._maps[name]

    def columns(self, first: int, last: int) -> dict[str, Tensor]:
        """Texts ``first`` to ``last`` as columns of a batch, right-padded to the longest text of all."""
        start_N, length_N = self.start_N[first:last, None], self.length_N[first:last]
        place_W = np.arange(self.meta["longest"])
        index_NW, is_token_NW = start_N + place_W, place_W < length_N[:, None]
        index_NW = np.where(is_token_NW, index_NW, 0)
        columns = {"text_ids": torch.from_numpy(np.where(is_token_NW, self.tokens("ids", np.int32)[index_NW], 0))}
        if self.meta["weighted"]:
            columns["text_weight"] = torch.from_numpy(np.where(is_token_NW, self.tokens("weights", np.float32)[index_NW], np.float32(0)))
        return {**columns, "text_length": torch.from_numpy(length_N.copy())}


def prepare(config: Config, reader: Any, path: str, progress: bool) -> Store:
    """The texts of a file for the rows of a reader, tokenised now unless they have been.

    Args:
        reader: a dump's, or what takes its place.
        progress: a bar on stderr.

    Raises:
        DataError: the file cannot be read, or none of its texts is of a row.
    """
    tokenizer, file = load_tokenizer(config), Path(path)
    if not file.is_file():
        next(read_records(file))
    frame = Frame(config, tokenizer)
    what = [_VERSION, checksum(file), reader.identity, tokenizer_fingerprint(tokenizer), frame.room, config.given.text_column]
    name = hashlib.sha256(json.dumps([*what, config.given.spans_column]).encode()).hexdigest()[:16]
    folder = Path(config.pretokenize.root) / "texts" / f"{file.stem}-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Lock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "meta.json").is_file():
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed: we hold the lock
                shutil.rmtree(left)
            unfinished = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
            unfinished.mkdir()
            try:
                _build(config, tokenizer, frame.room, _Rows(reader), file, unfinished, progress)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return Store(folder)


def _build(config: Config, tokenizer: PreTrainedTokenizerBase, room: int, rows: _Rows, file: Path, folder: Path, progress: bool) -> None:
    index: list[np.ndarray] = []
    counts = dict.fromkeys(("texts", "unknown", "empty", "cut"), 0)
    longest, at, weighted = 1, 0, False
    with (folder / "ids.bin").open("wb") as ids, (folder / "weights.bin").open("wb") as weights:
        for texts in _chunked(_texts(config, rows, file, counts), progress):
            found = tokenizer(
                [text for _, text, _ in texts], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            for (row, _, spans), tokens, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
                if not tokens:
                    counts["empty"] += 1
                    continue
                counts["cut"] += len(tokens) > room
                tokens = tokens[:room]
                ids.write(np.array(tokens, np.int32).tobytes())
                weights.write(_token_weights(offsets[:room], spans).tobytes())
                index.append(np.array([row, at, len(tokens)], np.int64))
                longest, at, weighted = max(longest, len(tokens)), at + len(tokens), weighted or bool(spans)
    if not index:
        raise DataError(
            f"{file}: none of its {counts['texts'] + counts['unknown']} texts is of a row of the dump; see sample_id, doc_id and position"
        )
    index_3N = np.stack(index, axis=1)
    index_3N = index_3N[:, np.argsort(index_3N[0], kind="stable")]
    np.save(folder / "index.npy", index_3N)
    if not weighted:
        (folder / "weights.bin").unlink()
    about = {"kept": len(index), "rows": len(np.unique(index_3N[0])), "of_rows": len(rows.doc_id_N), "room": room}
    save_json(folder / "meta.json", {**counts, **about, "longest": longest, "weighted": weighted, "file": str(file)})


def _texts(config: Config, rows: _Rows, file: Path, counts: dict[str, int]) -> Iterator[tuple[int, str, list]]:
    """Row, text and spans of each text that is of a row; all others are counted."""
    text_column, spans_column = config.given.text_column, config.given.spans_column
    for record in read_records(file, {"sample_id", "doc_id", "position", text_column, spans_column}):
        texts = record.fields.get(text_column)
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{record.where}: the column '{text_column}' must hold a text or a list of texts; given.text_column names another"
            )
        spans = _spans(record, spans_column) if len(texts) == 1 else []
        row = rows.find(record)
        counts["texts" if row >= 0 else "unknown"] += len(texts)
        yield from ((row, text, spans) for text in texts if row >= 0)


def _spans(record: Record, column: str) -> list[tuple[int, int, float]]:
    spans = record.fields.get(column) or []
    try:
        return [(int(start), int(end), float(weight)) for start, end, weight in spans]
    except (TypeError, ValueError):
        raise DataError(f"{record.where}: the column '{column}' must hold spans [first character, one past the last, weight]") from None


def _token_weights(offsets: list[tuple[int, int]], spans: list[tuple[int, int, float]]) -> np.ndarray:
    """Of each token, by the span in which its last character lies; 1 outside, the last span's where several hold it."""
    weights = np.ones(len(offsets), np.float32)
    last = np.array([end - 1 for _, end in offsets])
    for start, end, weight in spans:
        weights[(last >= start) & (last < end)] = weight
    return weights


def _chunked(texts: Iterator, progress: bool) -> Iterator[list]:
    with tqdm(desc="texts", unit=" texts", disable=not progress) as bar:
        chunk = []
        for text in texts:
            chunk.append(text)
            if len(chunk) == _CHUNK:
                yield chunk
                bar.update(len(chunk))
                chunk = []
        if chunk:
            yield chunk
            bar.update(len(chunk))


# ------------------------------------------------------------------------------------------------------------ the reader


class TextReader:
    """The rows of a dump that have texts, each as often as it has texts: an epoch gives every text once.

    Takes the place of a :class:`~megalens.data.shards.ShardReader` in a loader. Its batches have the columns ``text_ids``,
    ``text_length`` and, where a text has spans, ``text_weight`` as well.

    Args:
        reader: the dump's, or what takes its place.
        store: the texts of its rows.
    """

    def __init__(self, reader: Any, store: Store):
        self.reader, self.store, self.folder = reader, store, reader.folder
        first_row = np.concatenate([[0], np.cumsum(reader.batch_rows)])
        ends = np.searchsorted(store.row_N, first_row)
        self._batches = np.flatnonzero(np.diff(ends))  # record batches without a text are left out
        self._first_row, self._bounds = first_row[self._batches], np.stack([ends[self._batches], ends[self._batches + 1]], axis=1)
        self.batch_rows = self._bounds[:, 1] - self._bounds[:, 0]
        text_bytes = store.meta["longest"] * (8 if store.meta["weighted"] else 4) + 8
        self.meta = {**reader.meta, "rows": len(store.row_N), "rows_per_batch": int(self.batch_rows.max()), "text_bytes": text_bytes}
        self.identity = hashlib.sha256(json.dumps([reader.identity, store.folder.name]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.store.row_N)

    @property
    def statistics(self) -> Any:
        """Of all activations of the dump, with and without texts."""
        return self.reader.statistics

    def read_batch(self, index: int) -> dict[str, Tensor]:
        """A record batch, its rows repeated for each of their texts."""
        first, last = self._bounds[index]
        member_N = torch.from_numpy(self.store.row_N[first:last] - self._first_row[index])
        rows = {name: value[member_N] for name, value in self.reader.read_batch(int(self._batches[index])).items()}
        return {**rows, **self.store.columns(int(first), int(last))}

    def column(self, name: str) -> np.ndarray:
        """One number per text (``doc_id``, ...)."""
        return _column(self.reader, name)[self.store.row_N]

    def check_matches(self, wanted: dict) -> None:
        """As :meth:`ShardReader.check_matches <megalens.data.shards.ShardReader.check_matches>` of the dump."""
        self.reader.check_matches(wanted)


def with_texts(config: Config, reader: Any, split: str, tell: bool) -> Any:
    """A reader with the given texts of its split; the reader itself where there are none.

    Args:
        split: ``train`` or ``val``.
        tell: say on stderr how many texts there are and what is left out.

    Raises:
        DataError: as of :func:`prepare`.
    """
    path = config.given.path if split == "train" else config.given.val_path
    if path is None:
        return reader
    store = prepare(config, reader, path, progress=tell)
    if tell:
        print(told(store, path), file=sys.stderr)
    return TextReader(reader, store)


def told(store: Store, path: str) -> str:
    """In one line, how many texts of a file are used, and what is left out."""
    m = store.meta
    missing = m["of_rows"] - m["rows"]
    notes = [
        f"{missing:,} rows have none and are left out" if missing else "",
        f"{m['unknown']:,} texts are of no row" if m["unknown"] else "",
        f"{m['empty']:,} are empty" if m["empty"] else "",
        f"{m['cut']:,} are cut to their first {m['room']} tokens (t_text)" if m["cut"] else "",
    ]
    return "; ".join([f"given texts of {path}: {m['kept']:,} for {m['rows']:,} of {m['of_rows']:,} rows", *filter(None, notes)])
