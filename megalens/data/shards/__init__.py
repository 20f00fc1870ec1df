"""Activation shards: a folder of Arrow files and one ``meta.json``. ``docs/format.md`` describes both for other languages."""

from megalens.data.shards.meta import REDUMP, read_meta
from megalens.data.shards.reader import ShardReader, file_problem, verify
from megalens.data.shards.rows import batch_sizes
from megalens.data.shards.writer import ShardWriter, discard

__all__ = ["REDUMP", "ShardReader", "ShardWriter", "batch_sizes", "discard", "file_problem", "read_meta", "verify"]
