"""Small dumps of made-up rows, for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalens.data.shards import ShardWriter

D, SEQ_LEN = 16, 12


def make_rows(count: int, d: int = D, seed: int = 0) -> dict[str, Tensor]:
    """Random rows as :meth:`ShardWriter.write` takes them; about three of each document."""
    draw = torch.Generator().manual_seed(seed)
    position = torch.randint(0, SEQ_LEN, (count,), generator=draw)
    ids = torch.randint(1, 500, (count, SEQ_LEN), generator=draw) * (torch.arange(SEQ_LEN) <= position[:, None])
    activation = (torch.randn(count, d, generator=draw) * 3 + 1).bfloat16()
    return {"activation": activation, "input_ids": ids, "position": position, "doc_id": torch.arange(count) // 3}


def header(rows: int, **changes) -> dict:
    """A header as the dump writes it."""
    return {
        "subject": {"name": "toy", "fingerprint": "s"},
        "tokenizer": {"name": "toy", "fingerprint": "t"},
        "layer": 2,
        "d": D,
        "encoding": "bf16_planes",
        "seq_len": SEQ_LEN,
        "token_type": "uint16",
        "rows": rows,
        "rows_per_shard": 100,
        "rows_per_batch": 16,
        **changes,
    }


def make_dump(folder: Path, count: int = 250, seed: int = 0, **changes) -> dict[str, Tensor]:
    """Write a finished dump and return its rows."""
    rows = make_rows(count, changes.get("d", D), seed)
    writer = ShardWriter(folder, header(count, **changes))
    writer.begin()
    writer.calibrate(rows["activation"])
    for index in range(writer.num_shards):
        part = writer.shard_rows(index)
        writer.write(index, {name: value[part.start : part.stop] for name, value in rows.items()})
    assert writer.finish()
    return rows
