"""The installed W&B client, unmodified, as a person calls it, and what its offline runs have written."""

import json
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def wandb(*arguments: str) -> str:
    """Run the client; returns what it printed."""
    done = subprocess.run(["wandb", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def create(file: Path | str) -> str:
    """`wandb sweep FILE`; returns ENTITY/PROJECT/SWEEP_ID."""
    return re.search(r"wandb agent (\S+)", wandb("sweep", str(file)))[1]


def logged(folder: Path, run_id: str) -> dict:
    """The last figures that the offline runs of this id under ``folder`` hold; {} when there are none."""
    figures = {}
    for record in records(folder, run_id):
        figures |= {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
    return figures


def records(folder: Path, run_id: str) -> Iterator[wandb_internal_pb2.Record]:
    """The records of the offline runs of this id, read from W&B's own files."""
    for file in sorted(folder.glob(f"outputs/*/wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def _records(content: bytes) -> Iterator[bytes]:
    """Behind 7 bytes of head a .wandb file is LevelDB's log: blocks of 32 KiB with (checksum, length, kind) chunks."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (1 << 15) - at % (1 << 15) < 7:  # the rest of a block is padding
            at += (1 << 15) - at % (1 << 15)
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""
