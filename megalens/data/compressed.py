"""Is a ``.zst`` file whole? Decompressors take one that is cut short for one that ends early, and say nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import zstandard

_SKIPPABLE = 0x184D2A50  # the 16 magic numbers from here on: frames of other content
_LARGEST_HEADER = 18
_RLE = 1  # a block of one byte, repeated


def is_whole(path: Path) -> bool:
    """Does the file end where a frame does? Walks from block to block (RFC 8878) and decompresses nothing.

    Raises:
        zstandard.ZstdError: it is no zstd file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            _skip_frame(file)
        return file.tell() == size


def _skip_frame(file: BinaryIO) -> None:
    """Move to the end of a frame; beyond the end of the file when it is cut short."""
    start = file.read(_LARGEST_HEADER)
    if len(start) >= 8 and int.from_bytes(start[:4], "little") & ~0xF == _SKIPPABLE:
        file.seek(8 + int.from_bytes(start[4:8], "little") - len(start), os.SEEK_CUR)
        return
    if zstandard.FRAME_HEADER[: len(start)] == start:
        file.seek(_LARGEST_HEADER, os.SEEK_CUR)
        return
    header = zstandard.frame_header_size(start)
    if header > len(start):
        file.seek(header, os.SEEK_CUR)
        return
    file.seek(header - len(start), os.SEEK_CUR)
    last = False
    while not last:
        block = file.read(3)
        if len(block) < 3:
            file.seek(3, os.SEEK_CUR)
            return
        value = int.from_bytes(block, "little")
        last, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
        file.seek(1 if kind == _RLE else size, os.SEEK_CUR)
    if zstandard.get_frame_parameters(start).has_checksum:
        file.seek(4, os.SEEK_CUR)
