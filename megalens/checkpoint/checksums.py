"""The files of a checkpoint, each held against its checksum as it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from megalens.checkpoint import CheckpointError
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
        raise CheckpointError(f"{path} can not be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} can not be read: it holds no JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    check_file(path)
    try:
        return load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} can not be read: {error}") from None


def sums_of(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in paths}


def check_file(path: Path) -> None:
    """Hold a file of a checkpoint against its checksum, where the checkpoint has checksums.

    Raises:
        CheckpointError: it is damaged, or not the checkpoint's.
    """
    sums = _checksums(path.parent.resolve())
    if sums is not None and path.is_file():
        _hold(path.parent.resolve(), path.name, sums)


def check_checkpoint(folder: Path, share: slice = slice(None)) -> None:
    """Hold every file, or a share of them, of a checkpoint against its checksum.

    Raises:
        CheckpointError: one is damaged, missing or not the checkpoint's.
    """
    sums = _checksums(folder)
    if sums is not None:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {CHECKSUMS}
        for name in sorted(found | sums.keys())[share]:
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
    if not path.is_file() or name not in sums or checksum(path) != sums[name]:
        what = "is missing" if not path.is_file() else "does not match its checksum in checksums.json: one of the two is damaged"
        raise CheckpointError(f"{path} {what}; {_mend(folder)}")


def _mend(folder: Path) -> str:
    """How to go on without a damaged checkpoint."""
    others = sorted(path.name for path in folder.parent.glob("step-*") if path.name != folder.name)
    older = f"go back to another with `ln -sfn checkpoints/{others[-1]} {folder.parent.parent / 'last'}`, " if others else ""
    return f"copy it anew from where it is whole, {older}or train anew with checkpoint.resume=false"
