"""Activations that others have read out, as a dump."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalens.config import Config
from megalens.data import DataError
from megalens.data.identity import model_identity
from megalens.data.shards import ShardWriter
from megalens.families.loading import load_tokenizer


def convert(config: Config, source: Path, folder: Path, ids: Path | None = None, split: str = "train") -> tuple[int, int]:
    """Make a dump of a file's activations.

    Args:
        config: ``model_name`` and ``layer_l`` say what was read, ``activation_dumper`` how it is kept.
        source: ``.parquet``, ``.safetensors`` or ``.npy``, as :func:`read` takes them.
        folder: where the dump comes to lie.
        ids: token ids ``[N, C]`` beside an ``.npy``.
        split: written in ``meta.json``.

    Returns:
        How many rows, and how wide.

    Raises:
        DataError: the source does not serve, or there is a dump already.
    """
    if (folder / "meta.json").exists():
        raise DataError(f"there is a dump in {folder}; name another folder")
    rows = check(read(source, ids), source)
    write(config, folder, rows, split)
    return len(rows["activation"]), rows["activation"].shape[1]


def read(source: Path, ids: Path | None) -> dict[str, Tensor]:
    """``activation`` and ``input_ids``, and ``position`` and ``doc_id`` where the source has them.

    Raises:
        DataError: there is no such file, or a part is missing.
    """
    if not source.is_file():
        raise DataError(f"there is no file {source}")
    if source.suffix == ".parquet":
        return from_parquet(source)
    if source.suffix == ".safetensors":
        rows = load_file(source)
        if missing := {"activation", "input_ids"} - rows.keys():
            raise DataError(f"{source} has no {' and no '.join(sorted(missing))}; it has {', '.join(sorted(rows))}")
        return {name: rows[name] for name in ("activation", "input_ids", "position", "doc_id") if name in rows}
    if source.suffix == ".npy" and ids is not None:
        arrays = {"activation": np.load(source, allow_pickle=False), "input_ids": np.load(ids, allow_pickle=False)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    mend = "name the token ids: ids=FILE.npy" if source.suffix == ".npy" else "give .parquet, .safetensors or .npy"
    raise DataError(f"{source} cannot be converted; {mend}")


def from_parquet(source: Path) -> dict[str, Tensor]:
    """The rows of a Parquet file, as :func:`read` gives them."""
    table = pq.read_table(source)
    ids = next((name for name in ("input_ids", "token_ids") if name in table.column_names), None)
    if ids is None or "activation_vector" not in table.column_names:
        raise DataError(f"{source} has no activation_vector, or no input_ids or token_ids; it has {', '.join(table.column_names)}")
    lists, vectors = table[ids].combine_chunks(), table["activation_vector"].combine_chunks()
    widths, lengths_N = (pa.compute.list_value_length(column).to_numpy() for column in (vectors, lists))
    if vectors.null_count or lists.null_count or len(set(widths.tolist())) != 1 or lengths_N.min() < 1:
        raise DataError(f"{source}: every row needs an activation_vector of one width and at least one token")
    ids_NC = np.zeros((len(table), lengths_N.max()), np.int64)
    ids_NC[np.arange(ids_NC.shape[1]) < lengths_N[:, None]] = lists.flatten().to_numpy()
    rows = {"activation": torch.tensor(vectors.flatten().to_numpy()).view(len(table), -1), "input_ids": torch.from_numpy(ids_NC)}
    rows["position"] = torch.from_numpy(lengths_N.astype(np.int64) - 1)
    return rows | ({"doc_id": torch.tensor(table["doc_id"].to_numpy())} if "doc_id" in table.column_names else {})


def check(rows: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The rows with every part there.

    Raises:
        DataError: their shapes do not fit.
    """
    count = len(rows["activation"])
    rows.setdefault("position", torch.full((count,), rows["input_ids"].shape[-1] - 1))
    rows.setdefault("doc_id", torch.arange(count))
    shapes = {name: tuple(value.shape) for name, value in rows.items()}
    fits = rows["activation"].dim() == rows["input_ids"].dim() == 2 and shapes["position"] == shapes["doc_id"] == (count,) and count
    if not fits or len(rows["input_ids"]) != count or not ((rows["position"] >= 0) & (rows["position"] < shapes["input_ids"][1])).all():
        raise DataError(f"{source}: activation [N, d], input_ids [N, C], position [N] (0 to C - 1) and doc_id [N] do not fit: {shapes}")
    return rows | {name: rows[name].long() for name in ("input_ids", "position", "doc_id")} | {"activation": rows["activation"].float()}


def write(config: Config, folder: Path, rows: dict[str, Tensor], split: str) -> None:
    """Write the dump."""
    settings, vocabulary = config.activation_dumper, len(load_tokenizer(config))
    if int(rows["input_ids"].max()) >= vocabulary or int(rows["input_ids"].min()) < 0:
        raise DataError(f"there are token ids that the tokenizer of {config.model_name} does not have; set model_name or tokenizer_name")
    header = {
        **model_identity(config),
        "d": rows["activation"].shape[1],
        "encoding": settings.encoding,
        "token_type": "uint16" if vocabulary <= 1 << 16 else "int32",
        "vocab_size": vocabulary,
        "split": split,
        "seq_len": rows["input_ids"].shape[1],
        "rows": len(rows["activation"]),
        "rows_per_shard": settings.rows_per_shard,
        "rows_per_batch": settings.rows_per_batch,
    }
    writer = ShardWriter(folder, header)
    writer.begin()
    writer.calibrate(rows["activation"][: settings.rows_per_shard])
    for index in range(writer.num_shards):
        part = writer.shard_rows(index)
        writer.write(index, {name: value[part.start : part.stop] for name, value in rows.items()})
    writer.finish()
