"""The files of a checkpoint, each held against its checksum as it is read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from megalens.checkpoint import CheckpointError, finished_checkpoints
from megalens.files import checksum

CHECKSUMS = "checksums.json"


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    check_file(path)
    try:
        return load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def sums_of(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Checksums of files, by their paths in the folder."""
    return {str(path.relative_to(folder)): checksum(path) for path in paths}


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Give a checkpoint its checksums, written without a blank: no byte of them can change and mean the same."""
    (folder / CHECKSUMS).write_text(json.dumps(dict(sorted(sums.items())), separators=(",", ":")), encoding="utf-8")


def check_file(path: Path) -> None:
    """Hold a file of a checkpoint against its checksum, where the checkpoint has checksums.

    Raises:
        CheckpointError: it is damaged, or not the checkpoint's.
    """
    sums = _checksums(path.parent.resolve())
    if sums is not None and path.is_file():
        _hold(path.parent.resolve(), path.name, sums)


def check_checkpoint(folder: Path, share: slice = slice(None)) -> None:
    """Hold every file, or a share of them, of a checkpoint against its checksum. Files that are not the checkpoint's do not count.

    Raises:
        CheckpointError: one is damaged or missing.
    """
    sums = _checksums(folder)
    if sums is not None:
        for name in sorted(sums)[share]:
            _hold(folder, name, sums)


def _checksums(folder: Path) -> dict[str, str] | None:
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        sums = json.loads(path.read_bytes())
    except ValueError:
        sums = None
    if not isinstance(sums, dict):
        raise CheckpointError(f"{path} is damaged; {_mend(folder)}")
    return sums


def _hold(folder: Path, name: str, sums: dict[str, str]) -> None:
    path = folder / name
    if path.is_file() and name not in sums:
        raise CheckpointError(f"{path} is not a file of the checkpoint: checksums.json does not list it; move it away")
    if not path.is_file() or checksum(path) != sums[name]:
        what = "is missing" if not path.is_file() else "does not match its checksum in checksums.json: one of the two is damaged"
        raise CheckpointError(f"{path} {what}; {_mend(folder)}")


def _mend(folder: Path) -> str:
    """How to go on without a damaged checkpoint."""
    others = [path.name for path in finished_checkpoints(folder.parent) if path.name != folder.name]
    last = shlex.quote(str(folder.parent.parent / "last"))
    older = f"go back to another with `ln -sfn checkpoints/{others[-1]} {last}`, " if others else ""
    return f"copy it anew from where it is whole, {older}or train anew with checkpoint.resume=false"
