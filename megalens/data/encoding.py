"""How an activation lies in a shard: Arrow columns to and from tensors, one class an encoding."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from megalens.data import DataError


class Encoding(ABC):
    """One way to keep activations ``[N, d]``.

    Attributes:
        name: in the configuration and in ``meta.json``.
        values: encodings of the same ``values`` give back the same numbers; a dump of one serves for another.
        decoded: dtype of what :meth:`decode` gives.
        bytes_per_value: on the disk, about, compressed (measured on SmolLM2-135M).
        scaled: does it want a scale for each dimension, ``scale_D``: the standard deviation, which a dump measures beforehand?
    """

    name: str
    values: str
    decoded: torch.dtype
    bytes_per_value: float
    scaled = False

    @abstractmethod
    def fields(self, d: int) -> list[pa.Field]:
        """The Arrow fields of an activation of width ``d``."""

    @abstractmethod
    def encode(self, a_ND: Tensor, scale_D: np.ndarray | None) -> list[pa.Array]:
        """The columns of some rows, one for each field."""

    @abstractmethod
    def decode(self, batch: pa.RecordBatch, scale_D: np.ndarray | None) -> Tensor:
        """Rows ``[N, d]`` of a record batch, exactly as stored."""

    def _lists(self, d: int, value: pa.DataType, *names: str) -> list[pa.Field]:
        """``FixedSizeList[d]`` of some values, the encoding in the field's metadata."""
        kind = pa.list_(pa.field("item", value, nullable=False), d)
        return [pa.field(name, kind, nullable=False, metadata={"encoding": self.name}) for name in names]

    def _columns(self, *values_ND: np.ndarray) -> list[pa.Array]:
        fields = self.fields(values_ND[0].shape[1])
        return [
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type)
            for values, field in zip(values_ND, fields, strict=False)
        ]


class Bf16(Encoding):
    """bfloat16's bits; float32 is rounded to nearest."""

    name, values, decoded, bytes_per_value = "bf16", "bf16", torch.bfloat16, 1.56

    def fields(self, d: int) -> list[pa.Field]:
        return self._lists(d, pa.uint16(), "activation")

    def encode(self, a_ND: Tensor, scale_D: np.ndarray | None) -> list[pa.Array]:
        return self._columns(_bits(a_ND))

    def decode(self, batch: pa.RecordBatch, scale_D: np.ndarray | None) -> Tensor:
        return _from_bits(_rows(batch, "activation").copy())


class Bf16Planes(Encoding):
    """bfloat16's bits, high and low bytes apart, which compresses better."""

    name, values, decoded, bytes_per_value = "bf16_planes", "bf16", torch.bfloat16, 1.38

    def fields(self, d: int) -> list[pa.Field]:
        return self._lists(d, pa.uint8(), "activation_high", "activation_low")

    def encode(self, a_ND: Tensor, scale_D: np.ndarray | None) -> list[pa.Array]:
        bits_ND = _bits(a_ND)
        return self._columns((bits_ND >> 8).astype(np.uint8), bits_ND.astype(np.uint8))

    def decode(self, batch: pa.RecordBatch, scale_D: np.ndarray | None) -> Tensor:
        bits_ND = _rows(batch, "activation_high").astype(np.uint16)
        bits_ND <<= 8
        bits_ND |= _rows(batch, "activation_low")
        return _from_bits(bits_ND)


class Int8(Encoding):
    """Each dimension divided by its scale, and each row then by its largest value over 127. Lossy."""

    name, values, decoded, bytes_per_value, scaled = "int8", "int8", torch.float32, 0.9, True

    def fields(self, d: int) -> list[pa.Field]:
        return [*self._lists(d, pa.int8(), "activation"), pa.field("activation_scale", pa.float32(), nullable=False)]

    def encode(self, a_ND: Tensor, scale_D: np.ndarray | None) -> list[pa.Array]:
        scaled_ND = a_ND.float().numpy() / scale_D
        scale_N = np.maximum(np.abs(scaled_ND).max(1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        return [*self._columns(np.clip(np.rint(scaled_ND / scale_N[:, None]), -127, 127).astype(np.int8)), pa.array(scale_N)]

    def decode(self, batch: pa.RecordBatch, scale_D: np.ndarray | None) -> Tensor:
        return torch.from_numpy(_rows(batch, "activation") * batch["activation_scale"].to_numpy()[:, None] * scale_D)


class Fp32(Encoding):
    """float32 as it is."""

    name, values, decoded, bytes_per_value = "fp32", "fp32", torch.float32, 3.7

    def fields(self, d: int) -> list[pa.Field]:
        return self._lists(d, pa.float32(), "activation")

    def encode(self, a_ND: Tensor, scale_D: np.ndarray | None) -> list[pa.Array]:
        return self._columns(a_ND.float().contiguous().numpy())

    def decode(self, batch: pa.RecordBatch, scale_D: np.ndarray | None) -> Tensor:
        return torch.tensor(_rows(batch, "activation"))


ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in (Bf16(), Bf16Planes(), Int8(), Fp32())}
"""Every encoding there is, by name. A new one is registered here."""


def encoding_of(name: str) -> Encoding:
    """The encoding of a name.

    Raises:
        DataError: there is none.
    """
    if name not in ENCODINGS:
        raise DataError(f"activation_dumper.encoding={name} must be one of: {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def _rows(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return batch[name].flatten().to_numpy().reshape(len(batch), -1)


def _bits(a_ND: Tensor) -> np.ndarray:
    return a_ND.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def _from_bits(bits_ND: np.ndarray) -> Tensor:
    return torch.from_numpy(bits_ND.view(np.int16)).view(torch.bfloat16)
