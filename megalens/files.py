"""Files that appear whole or not at all, folders that are only read (local or remote), locks, checksums."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.fs
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_without_locks: set[int] = set()  # disks (st_dev) that this process has warned about


class DiskFull(ValueError):
    """No space is left. The message is one line and names the mend."""


class ChecksumFile:
    """A binary file that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.bytes, self._hash, self.closed = file, 0, xxhash.xxh3_64(), False

    def write(self, data) -> int:
        """Write all of ``data``."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.bytes += len(view)
        self.file.write(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.file.flush()

    def close(self) -> None:
        """Does nothing: the caller that opened the file closes it."""

    @property
    def checksum(self) -> str:
        """xxh3_64 of everything written, 16 hexadecimal digits."""
        return self._hash.hexdigest()


@contextmanager
def new_file(path: Path, scratch: Path | None = None) -> Iterator[ChecksumFile]:
    """Write a file that gets its name only when it is complete and on the disk.

    Args:
        path: the final name; what stands there is replaced in one go.
        scratch: folder of the unfinished file, on the same disk; None: beside the final one.

    Raises:
        DiskFull: the disk is full.
    """
    unfinished = (scratch or path.parent) / f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        with unfinished.open("wb") as file:
            yield ChecksumFile(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        raise explain_full_disk(error, path.parent) from None
    finally:
        unfinished.unlink(missing_ok=True)


def time_at(folder: Path) -> float:
    """The time of now by the clock that stamps a folder's files, in seconds since the epoch. A file server's may differ from ours.

    The folder is made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def explain_full_disk(error: OSError, folder: Path) -> OSError | DiskFull:
    """The error itself, or a readable one when the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no space left on the disk of {folder}; free some, or put the data on another disk, and run the same command again"
        )
    return error


def checksum(path: Path) -> str:
    """xxh3_64 of a file, 16 hexadecimal digits."""
    return Folder(path.parent).checksum(path.name)


class Folder:
    """A folder that is read: a local path, or anything ``fsspec`` opens (``s3://...``, ``memory://...``, ``filecache::s3://...``)."""

    def __init__(self, folder: str | Path):
        self._root, self._system = str(folder).rstrip("/"), pa.fs.LocalFileSystem()
        if "://" in self._root:
            remote, self._root = fsspec.core.url_to_fs(self._root)
            self._system = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(remote))

    def path(self, name: str) -> str:
        """The path of a file in it."""
        return f"{self._root}/{name}"

    def exists(self, name: str) -> bool:
        """Is there a file or folder of that name?"""
        return self._system.get_file_info(self.path(name)).type != pa.fs.FileType.NotFound

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""
        return self._system.get_file_info(self.path(name)).size

    def names(self) -> list[str]:
        """The names of all files in it."""
        return sorted(info.base_name for info in self._system.get_file_info(pa.fs.FileSelector(self._root)) if info.is_file)

    def open(self, name: str) -> pa.NativeFile:
        """A file for reading at any place."""
        return self._system.open_input_file(self.path(name))

    def map(self, name: str) -> mmap.mmap | None:
        """A file's memory map for reading, or None in a folder that is not local."""
        if not isinstance(self._system, pa.fs.LocalFileSystem):
            return None
        with open(self.path(name), "rb") as file:
            return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self.open(name) as file:
            return file.read()

    def checksum(self, name: str) -> str:
        """xxh3_64 of a file, 16 hexadecimal digits."""
        digest = xxhash.xxh3_64()
        with self.open(name) as file:
            while block := file.read_buffer(1 << 22):
                digest.update(block)
        return digest.hexdigest()


class Lock:
    """An exclusive lock on a file. A process that dies loses its lock, however it dies: the kernel frees it.

    Some disks (of clusters, mostly) have no locks. There every lock is ours at once, and a warning says so, once for each disk.

    Args:
        path: the lock's file, made if its folder is there.
    """

    def __init__(self, path: Path):
        self.path, self._descriptor = path, -1

    def acquire(self, wait: bool) -> bool:
        """True when the lock is ours; False when another holds it and ``wait`` is off.

        Raises:
            FileNotFoundError: the lock's folder is gone.
        """
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
                _warn_without_locks(self.path.parent)
            if _is_file(descriptor, self.path):
                self._descriptor = descriptor
                return True
            os.close(descriptor)  # the file was removed while we waited for it

    def fileno(self) -> int:
        """The open descriptor; a process that inherits it holds the lock as well."""
        return self._descriptor

    def release(self) -> None:
        """Free the lock; its file stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Lock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_) -> None:
        self.release()


def _warn_without_locks(folder: Path) -> None:
    disk = os.stat(folder).st_dev
    if disk not in _without_locks:
        _without_locks.add(disk)
        print(f"warning: the disk of {folder} has no locks; see to it that no other process writes there", file=sys.stderr)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


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


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(link: Path, target: Path) -> None:
    """Make ``link`` a relative symbolic link to ``target``, replacing an older one at once."""
    beside = link.with_name(f".{link.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(beside, link)
    sync(link.parent)
