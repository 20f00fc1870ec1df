"""``meta.json``: what a finished dump holds. It is written last and carries its own checksum."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from megalens.data import DataError
from megalens.files import Folder

FORMAT = "megalens-activations"
VERSION = 1
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
        DataError: it is missing, damaged, or of another format.
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
    return meta
