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


def decode_rows(record: pa.RecordBatch, meta: dict, scale_D: np.ndarray | None) -> dict[str, Tensor]:
    """The rows of a record batch, as :meth:`ShardReader.read_batch` gives them."""
    position_N = record["position"].to_numpy().astype(np.int64)
    ids_NC = np.zeros((len(record), meta["seq_len"]), np.int32)
    ids_NC[np.arange(ids_NC.shape[1]) <= position_N[:, None]] = record["input_ids"].flatten().to_numpy()
    return {
        "activation": encoding_of(meta["encoding"]).decode(record, scale_D),
        "input_ids": torch.from_numpy(ids_NC),
        "position": torch.from_numpy(position_N),
        "doc_id": torch.tensor(record["doc_id"].to_numpy()),
        "sample_id": torch.tensor(record["sample_id"].to_numpy()),
    }
