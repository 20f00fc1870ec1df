"""How an activation lies in a shard: Arrow columns to and from tensors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

_VALUES = {"bf16": pa.uint16(), "bf16_planes": pa.uint8(), "int8": pa.int8(), "fp32": pa.float32()}
_PLANES = ("activation_high", "activation_low")


def activation_fields(encoding: str, d: int) -> list[pa.Field]:
    """The Arrow fields of an activation of width ``d``: ``FixedSizeList[d]``, its encoding in the field's metadata."""
    kind = pa.list_(pa.field("item", _VALUES[encoding], nullable=False), d)
    names = _PLANES if encoding == "bf16_planes" else ("activation",)
    fields = [pa.field(name, kind, nullable=False, metadata={"encoding": encoding}) for name in names]
    return [*fields, pa.field("activation_scale", pa.float32(), nullable=False)] if encoding == "int8" else fields


def encode_activation(a_ND: Tensor, encoding: str, scale_D: np.ndarray | None = None) -> list[pa.Array]:
    """The columns of some rows; bf16 encodings keep bf16 bits exactly and round float32 to nearest.

    ``int8`` divides each dimension by ``scale_D`` and each row then by its largest value over 127.
    """
    if encoding == "int8":
        scaled_ND = a_ND.float().numpy() / scale_D
        scale_N = np.maximum(np.abs(scaled_ND).max(1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        values = [np.clip(np.rint(scaled_ND / scale_N[:, None]), -127, 127).astype(np.int8)]
    elif encoding == "fp32":
        values = [a_ND.float().contiguous().numpy()]
    else:
        bits_ND = a_ND.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)
        values = [bits_ND] if encoding == "bf16" else [(bits_ND >> 8).astype(np.uint8), bits_ND.astype(np.uint8)]
    kind = activation_fields(encoding, a_ND.shape[1])[0].type
    columns = [pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), type=kind) for v in values]
    return [*columns, pa.array(scale_N)] if encoding == "int8" else columns


def decode_activation(batch: pa.RecordBatch, encoding: str, scale_D: np.ndarray | None = None) -> Tensor:
    """Rows ``[N, d]`` of a record batch, bfloat16 or float32, exactly as stored."""
    names = _PLANES if encoding == "bf16_planes" else ("activation",)
    columns = [batch[name].flatten().to_numpy().reshape(len(batch), -1) for name in names]
    if encoding == "int8":
        return torch.from_numpy(columns[0] * batch["activation_scale"].to_numpy()[:, None] * scale_D)
    if encoding == "fp32":
        return torch.tensor(columns[0])
    if encoding == "bf16":
        bits_ND = columns[0].copy()
    else:
        bits_ND = columns[0].astype(np.uint16)
        bits_ND <<= 8
        bits_ND |= columns[1]
    return torch.from_numpy(bits_ND.view(np.int16)).view(torch.bfloat16)


def bytes_per_value(encoding: str) -> float:
    """What a value takes on the disk, about, compressed (measured on SmolLM2-135M)."""
    return {"bf16": 1.56, "bf16_planes": 1.38, "int8": 0.9, "fp32": 3.7}[encoding]
