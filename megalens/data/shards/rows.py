"""Rows of a dump to and from an Arrow record batch."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from megalens.data.encoding import encoding_of
from megalens.data.shards.meta import FORMAT, VERSION


def batch_sizes(rows: int, per_batch: int) -> np.ndarray:
    """Rows of each record batch of a shard, int64."""
    return np.minimum(per_batch, rows - np.arange(0, rows, per_batch, dtype=np.int64))


def schema_of(header: dict) -> pa.Schema:
    """The columns of every shard of a dump with this header (:class:`~megalens.data.shards.ShardWriter`)."""
    tokens = {"uint16": pa.uint16(), "int32": pa.int32()}[header["token_type"]]
    fields = [
        *encoding_of(header["encoding"]).fields(header["d"]),
        pa.field("input_ids", pa.list_(tokens), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("sample_id", pa.int64(), nullable=False),
    ]
    return pa.schema(fields, metadata={"format": FORMAT, "format_version": str(VERSION)})


def encode_rows(rows: dict[str, Tensor], first: int, header: dict, schema: pa.Schema, scale_D: np.ndarray | None) -> pa.RecordBatch:
    """Rows as :meth:`ShardWriter.write` takes them; ``first`` is the number (``sample_id``) of the first."""
    count, position_N = len(rows["position"]), rows["position"].numpy()
    ids_NC = rows["input_ids"].numpy()
    tokens = ids_NC[np.arange(ids_NC.shape[1]) <= position_N[:, None]].astype(header["token_type"])
    offsets = np.concatenate([[0], np.cumsum(position_N + 1)]).astype(np.int32)
    columns = [
        *encoding_of(header["encoding"]).encode(rows["activation"], scale_D),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
        pa.array(position_N.astype(np.int32)),
        pa.array(np.full(count, header["layer"], np.int32)),
        pa.array(rows["doc_id"].numpy().astype(np.int64)),
        pa.array(np.arange(first, first + count, dtype=np.int64)),
    ]
    columns = [column.cast(field.type) if column.type != field.type else column for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def decode_rows(record: pa.RecordBatch, meta: dict, scale_D: np.ndarray | None, rows: int) -> dict[str, Tensor]:
    """The rows of a record batch, as :meth:`ShardReader.read_batch` gives them.

    Args:
        rows: how many it must hold.

    Raises:
        pa.ArrowInvalid: it holds others, or a row has not the tokens up to its position.
    """
    if len(record) != rows:
        raise pa.ArrowInvalid(f"a record batch holds {len(record)} rows instead of {rows}")
    if empty := next((name for name in record.schema.names if record[name].null_count), None):
        raise pa.ArrowInvalid(f"a {empty} is null")
    position_N, lists = record["position"].to_numpy().astype(np.int64), record["input_ids"]
    if (np.diff(lists.offsets.to_numpy()) != position_N + 1).any() or position_N.min() < 0 or position_N.max() >= meta["seq_len"]:
        raise pa.ArrowInvalid("a row has not the tokens from 0 to its position")
    ids_NC = np.zeros((len(record), meta["seq_len"]), np.int32)
    ids_NC[np.arange(ids_NC.shape[1]) <= position_N[:, None]] = lists.flatten().to_numpy()
    return {
        "activation": encoding_of(meta["encoding"]).decode(record, scale_D),
        "input_ids": torch.from_numpy(ids_NC),
        "position": torch.from_numpy(position_N),
        "doc_id": torch.tensor(record["doc_id"].to_numpy()),
        "sample_id": torch.tensor(record["sample_id"].to_numpy()),
    }
