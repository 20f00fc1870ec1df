"""The formats that a lens can lie in, and reading one whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats.format import Format, LoadedLens
from megalens.checkpoint.formats.megalens import Megalens
from megalens.checkpoint.formats.nla import Nla
from megalens.config import Config

FORMATS: list[Format] = [Megalens(), Nla()]

__all__ = ["FORMATS", "Format", "LoadedLens", "format_of", "load_lens", "read_config"]


def load_lens(folder: str | Path, **changes: Any) -> LoadedLens:
    """The lens of a folder, of whichever format.

    Args:
        folder: e.g. a checkpoint, ``outputs/<run>/best``.
        changes: configuration keys that are other here: ``device``, ``dtype``, ``model_name``, ``trust_remote_code`` (which is never
            taken from the folder).

    Raises:
        CheckpointError: it is of no format, it is damaged, or its subject is another model.
        ConfigError: its subject cannot be loaded, or the weights do not fit it.
    """
    folder = Path(folder)
    return format_of(folder).load(folder, **changes)


def read_config(folder: str | Path, arguments: Sequence[str] = (), **changes: Any) -> Config:
    """The configuration that the lens of a folder was trained with, whichever its format; see :meth:`Format.read_config`."""
    folder = Path(folder)
    return format_of(folder).read_config(folder, arguments, **changes)


def format_of(folder: Path) -> Format:
    """The format of a folder, as far as its files' names tell.

    Raises:
        CheckpointError: it is of none.
    """
    for each in FORMATS:
        if each.detect(folder):
            return each
    holds = "it holds " + ", ".join(f"no {each.looked_for}" for each in FORMATS) if folder.is_dir() else "it does not exist"
    raise CheckpointError(f"{folder} is no checkpoint: {holds}; a run's best one is outputs/<run>/best")
