"""``meta.json``: what a finished dump holds. It is written last and carries its own checksum."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megalens.data import DataError
from megalens.data.encoding import ENCODINGS
from megalens.files import Folder

FORMAT = "megalens-activations"
VERSION = 1
TOKEN_TYPES = ("uint16", "int32")
_COUNTS = ("d", "layer", "seq_len", "rows", "rows_per_batch")
_PER_DIMENSION = ("mean", "variance", "mean_normalised")
REDUMP = "make it anew: python tools/dump_acts.py config=... force_redump=true"


def render_meta(meta: dict) -> str:
    """The text of ``meta.json``: one key per line. The last line is the xxh3_64 of the text without it."""
    return one_key_per_line({**meta, "checksum": xxhash.xxh3_64_hexdigest(one_key_per_line(meta).encode())})


def one_key_per_line(values: dict) -> str:
    """JSON that a person can scan and ``diff`` can compare."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}\n"


def read_meta(folder: str | Path) -> dict:
    """``meta.json`` of a finished dump, checked against its own checksum.

    Raises:
        DataError: it is missing, damaged, of another format, or lacks something that a dump has.
    """
    files = Folder(folder)
    path = files.path("meta.json")
    if files.size("meta.json") is None:
        state = f"the dump in {folder} is not finished" if files.exists(".work") else f"there is no dump in {folder}"
        raise DataError(f"{state}; make it with: python tools/dump_acts.py config=...")
    try:
        text = files.read("meta.json").decode()
        meta = json.loads(text)
        intact = isinstance(meta, dict) and meta.pop("checksum", None) is not None and render_meta(meta) == text
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{path} does not match its checksum: it is damaged; {REDUMP}")
    if (meta.get("format"), meta.get("format_version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} is of format {meta.get('format')} version {meta.get('format_version')}, not {FORMAT} version {VERSION}; {REDUMP}"
        )
    if wrong := next(_wrong(meta), None):
        raise DataError(f"{path}: {wrong}; copy it anew, or {REDUMP}")
    return meta


def _wrong(meta: dict) -> Iterator[str]:
    """What of ``meta.json`` is not as a dump has it; reading goes by these keys."""
    for key in _COUNTS:
        least = 0 if key == "layer" else 1
        if not _is_count(meta.get(key), least):
            yield f"{key}={_short(meta.get(key))} must be a whole number of {least} or more"
            return
    for key, known in (("encoding", tuple(ENCODINGS)), ("token_type", TOKEN_TYPES)):
        if meta.get(key) not in known:
            yield f"{key}={_short(meta.get(key))} must be one of: {', '.join(known)}"
            return
    for key in (*_PER_DIMENSION, *(("int8_scale",) if ENCODINGS[meta["encoding"]].scaled else ())):
        value = meta.get(key)
        if not (isinstance(value, list) and len(value) == meta["d"] and all(_is_figure(each, key) for each in value)):
            yield f"{key} must be a list of d={meta['d']} numbers"
    for key in ("fve_loss", "fve_std_loss"):
        if key in meta and not _is_figure(meta[key], key):
            yield f"{key}={_short(meta[key])} must be a number"
    for key in ("subject", "tokenizer"):
        value = meta.get(key, {"name": "", "fingerprint": ""})
        if not (isinstance(value, dict) and all(isinstance(value.get(part), str) for part in ("name", "fingerprint"))):
            yield f"{key} must be {{name, fingerprint}}, each a text"
    shards = meta.get("shards")
    if not (isinstance(shards, list) and shards and all(_is_shard(shard) for shard in shards)):
        yield "shards must be a list of {file, rows, bytes, checksum}, each a file of the folder"
    elif sum(shard["rows"] for shard in shards) != meta["rows"]:
        yield f"the shards' rows do not add up to its {meta['rows']}"


def _is_shard(shard: Any) -> bool:
    if not (isinstance(shard, dict) and isinstance(shard.get("checksum"), str) and isinstance(shard.get("file"), str)):
        return False
    return (
        Path(shard["file"]).name == shard["file"]
        and "\0" not in shard["file"]
        and all(_is_count(shard.get(key), 1) for key in ("rows", "bytes"))
    )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 48


def _is_figure(value: Any, key: str) -> bool:
    """Is it a finite number, not negative where it cannot be?"""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and (value >= 0 or key.startswith("mean"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
