"""Models of the Hugging Face hub: the folder that holds one revision's files, whole, whatever happened to be cached before."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from megalens.config import ConfigError

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]  # settings, tokenizer, index of the weights, code
_folders: dict[tuple[str, str, str | None], Path] = {}  # by cache, name and revision


def snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """The folder of a hub model's files; what is not in the cache is fetched. In one process it stays the same commit.

    Args:
        name: as the hub calls it.
        revision: a branch, tag or commit; None: the main branch.
        weights: also the files that its weights are read from, and no other.

    Returns:
        The folder, called by its commit.

    Raises:
        ConfigError: it cannot be fetched, or the cache holds a part of it and there is no network.
    """
    known = (constants.HF_HUB_CACHE, name, revision)
    folder = _folders.get(known) or _fetched(name, revision, _SMALL)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}: there is no config.json in {folder}; {_mend(name, revision)}")
    if weights and _missing(folder):
        with suppress(ConfigError):
            _fetched(name, folder.name, _missing(folder))
        if left := _missing(folder):
            which = left[0] if len(left) == 1 else f"{left[0]} and {len(left) - 1} more"
            raise ConfigError(f"cannot load {name}: its cache in {folder} lacks {which}; {_mend(name, revision)}")
    _folders[known] = folder
    return folder


def weight_files(folder: Path) -> list[str]:
    """Names of the files that a model's weights are read from, whether or not they are there."""
    try:
        return sorted(set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or none that can be read, which is told as it is read
        return [SAFE_WEIGHTS_NAME]


def _missing(folder: Path) -> list[str]:
    return [file for file in weight_files(folder) if not (folder / file).is_file()]


def _fetched(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].strip().removesuffix(".")
        raise ConfigError(f"cannot load {name}{_of(revision)}: {reason}; {_mend(name, revision)}") from None


def _of(revision: str | None) -> str:
    return "" if revision is None else f" of revision {revision}"


def _mend(name: str, revision: str | None) -> str:
    option = "" if revision is None else f" --revision {revision}"
    return f"fetch it where there is a network (hf download {name}{option}) or name a local folder"
