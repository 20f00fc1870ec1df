"""The files of a local corpus: which they are, and a hash of what they hold."""

from __future__ import annotations

from pathlib import Path

import xxhash

from megalens.config import Config
from megalens.data import DataError

WIKI_LEADS = Path("data/corpus/wiki-leads.parquet")
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def source_name(config: Config) -> str:
    """What the corpus is called in messages."""
    return config.dataset.name if config.dataset.name != "wiki-leads" else str(WIKI_LEADS)


def local_files(config: Config) -> list[Path] | None:
    """The files of a local corpus in order; None: it is a dataset of the hub. Hidden files and folders (``.name``) are left out.

    Raises:
        DataError: there is no such file or folder, or it holds no files of one kind.
    """
    name, path = config.dataset.name, Path(source_name(config)).expanduser()
    if name == "wiki-leads" and not path.exists():
        raise DataError(f"the packaged corpus {path} is missing; make it with: python tools/prepare_demo.py")
    if not path.exists():
        if kind_of(path) or name.startswith((".", "/", "~")):
            raise DataError(f"dataset.name={name}: no such file or folder")
        return None
    if config.dataset.val_split:
        raise DataError(f"dataset.val_split is for datasets of the hub; {name} is divided by dataset.val_fraction, so leave it null")
    files = sorted(p for p in path.rglob("*") if kind_of(p) and not _is_hidden(p.relative_to(path))) if path.is_dir() else [path]
    kinds = {kind_of(p) for p in files}
    if len(kinds) != 1 or None in kinds:
        found = "several kinds of files" if len(kinds) > 1 else "no file that can be read"
        raise DataError(f"dataset.name={name} holds {found}; give .txt, .json or .jsonl, or .parquet files of one kind")
    if chained := next((p for p in files if "::" in str(p)), None):
        raise DataError(f"dataset.name={name}: the path {chained} cannot be read, as '::' stands for a file inside an archive; rename it")
    return files


def kind_of(path: Path) -> str | None:
    """``text``, ``json`` or ``parquet``, by the name; None: no file that can be read."""
    return _KINDS.get(Path(path.name.removesuffix(".zst")).suffix)


def source_fingerprint(config: Config) -> str | None:
    """A hash of the local files' names and contents; None for a dataset of the hub.

    Raises:
        DataError: the local file or folder is missing.
    """
    files = local_files(config)
    if files is None:
        return None
    digest = xxhash.xxh3_64()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
