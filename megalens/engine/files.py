"""Files that are whole or not there: written with their folder, flushed to the disk, then given their name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full or does not let us.
    """
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, str(path), metadata)
    except SafetensorError as error:
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EDQUOT if "os error 122" in str(error) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def save_json(path: Path, value: Any) -> None:
    """Write JSON, indented, to be read by people too."""
    path.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def checksum(path: Path) -> str:
    """xxh3_64 of a file, 16 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """The same for a folder and all in it."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, replacing an older one at once."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(beside, link)
    sync(link.parent)
