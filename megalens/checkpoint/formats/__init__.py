"""The formats that a lens can lie in, and reading one whichever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats.format import Format, LoadedLens
from megalens.checkpoint.formats.megalens import Megalens

FORMATS: list[Format] = [Megalens()]

__all__ = ["FORMATS", "Format", "LoadedLens", "load_lens"]


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
    for each in FORMATS:
        if each.detect(folder):
            return each.load(folder, **changes)
    holds = "it holds " + ", ".join(f"no {each.looked_for}" for each in FORMATS) if folder.is_dir() else "it does not exist"
    raise CheckpointError(f"{folder} is no checkpoint: {holds}; a run's best one is outputs/<run>/best")
