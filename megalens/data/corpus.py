"""Where the text comes from: the packaged corpus, local files, or the Hugging Face hub; cleaned, and divided by document."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import xxhash
import zstandard

from megalens.config import Config
from megalens.data import DataError

WIKI_LEADS = Path("data/corpus/wiki-leads.parquet")
_KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_DISAMBIGUATION = "may refer to"


def load_documents(config: Config) -> dict[str, datasets.Dataset]:
    """The usable documents of the corpus.

    A document is a row of a table, a line of a ``.jsonl``, or, in ``.txt`` files, what stands between blank lines (each line, where no
    file has a blank one). Documents of fewer than ``dataset.min_words`` words and disambiguation pages ("may refer to") are dropped.
    Without ``dataset.val_split``, a document is held out when the hash of its text with ``dataset.split_seed`` says so: equal texts
    lie on one side, and other settings (``min_words``, ``max_documents``) move no document to the other one.

    Returns:
        ``train`` and ``val``, each with the columns ``text`` and ``doc_id`` (the row's number in the source's split).

    Raises:
        DataError: the source is missing, unreadable, or has no usable document.
    """
    settings = config.dataset
    train = _usable(config, settings.split)
    if settings.val_split:
        return {"train": train.remove_columns("draw"), "val": _usable(config, settings.val_split).remove_columns("draw")}
    draw = np.array(train.with_format("numpy")["draw"])
    if draw.min() == draw.max():
        raise DataError(f"{_source(config)} has a single usable document; nothing is left to hold out for validation")
    held_out = (draw < settings.val_fraction * 2.0**63) | (draw == draw.min())
    held_out &= draw != draw.max()
    train = train.remove_columns("draw")
    return {"train": train.select(np.flatnonzero(~held_out)), "val": train.select(np.flatnonzero(held_out))}


def is_stream(config: Config) -> bool:
    """Is the corpus read as a stream (``pretokenize.streaming``, or compressed files)?"""
    return config.pretokenize.streaming or any(path.suffix == ".zst" for path in _local_files(config) or [])


def stream_documents(config: Config, split: str) -> Iterator[tuple[int, str]]:
    """The usable documents of ``train`` or ``val`` one by one, as ``doc_id`` and text; nothing is kept on the disk.

    The same documents as :func:`load_documents` gives, but that a corpus so small that one side stays empty is not mended.

    Raises:
        DataError: the source is missing or unreadable, or lacks the column.
    """
    settings, column = config.dataset, config.dataset.text_column
    own = split == "val" and settings.val_split
    rows = _load(config, settings.val_split if own else settings.split, streaming=True)
    limit = config.dataset.max_documents
    try:
        for doc_id, row in enumerate(rows if limit is None else islice(rows, limit)):
            if column not in row:
                raise DataError(f"{_source(config)} has no column '{column}'; set dataset.text_column to one of: {', '.join(row)}")
            mark = _mark({"text": [row[column]]}, settings.min_words, settings.split_seed)
            held_out = not settings.val_split and mark["draw"][0] < settings.val_fraction * 2.0**63
            if mark["usable"][0] and (own or held_out == (split == "val")):
                yield doc_id, row[column]
    except (OSError, zstandard.ZstdError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"can not read {_source(config)}: {' '.join(str(error.__cause__ or error).split())}") from None


def source_fingerprint(config: Config) -> str | None:
    """A hash of the local files' names and contents; None for a dataset of the hub.

    Raises:
        DataError: the local file or folder is missing.
    """
    files = _local_files(config)
    if files is None:
        return None
    digest = xxhash.xxh3_64()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def processes(config: Config, documents: int) -> int | None:
    """How many processes ``datasets`` shall use for so many documents; None: this one alone."""
    wanted = min(config.pretokenize.num_proc or len(os.sched_getaffinity(0)), documents // 500)
    return wanted if wanted > 1 else None


def _source(config: Config) -> str:
    return config.dataset.name if config.dataset.name != "wiki-leads" else str(WIKI_LEADS)


def _usable(config: Config, split: str) -> datasets.Dataset:
    """Columns ``text``, ``doc_id`` and ``draw`` (63 random bits that decide the division) of the documents that are kept."""
    settings, column = config.dataset, config.dataset.text_column
    found = _load(config, split)
    if column not in found.column_names:
        raise DataError(f"{_source(config)} has no column '{column}'; set dataset.text_column to one of: {', '.join(found.column_names)}")
    found = found.select_columns([column])
    if column != "text":
        found = found.rename_column(column, "text")
    found = found.select(range(min(len(found), settings.max_documents or len(found))))
    marks = found.map(
        _mark,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"min_words": settings.min_words, "seed": settings.split_seed},
        num_proc=processes(config, len(found)),
        desc=f"reading {split}",
    ).with_format("numpy")
    usable = np.flatnonzero(marks["usable"]) if len(found) else []
    if len(usable) == 0:
        raise DataError(
            f"{_source(config)} has no usable document in column '{column}': none of its {len(found)} rows is text of at least "
            f"dataset.min_words={settings.min_words} words"
        )
    texts = found.add_column("doc_id", np.arange(len(found))).add_column("draw", np.asarray(marks["draw"]))
    return texts.select(usable)


def _mark(batch: dict[str, list], min_words: int, seed: int) -> dict[str, list]:
    texts = [text if isinstance(text, str) else "" for text in batch["text"]]
    usable = [len(text.split()) >= max(1, min_words) and _DISAMBIGUATION not in text for text in texts]
    draw = [xxhash.xxh3_64_intdigest(text.encode(errors="replace"), seed=seed % (1 << 63)) >> 1 for text in texts]
    return {"usable": usable, "draw": draw}


def _load(config: Config, split: str, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    files = _local_files(config)
    try:
        if files is None:
            return datasets.load_dataset(config.dataset.name, config.dataset.config_name, split=split, streaming=streaming)
        kind = _kind(files[0])
        options = {"sample_by": "paragraph" if _has_blank_line(files) else "line"} if kind == "text" else {}
        return datasets.load_dataset(kind, data_files=[str(path) for path in files], split="train", streaming=streaming, **options)
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it is empty"
        hint = "" if files else " (no local file has that name; dataset.name takes wiki-leads, a file or folder, or a dataset of the hub)"
        raise DataError(f"can not read {_source(config)}: {reason}{hint}") from None


def _local_files(config: Config) -> list[Path] | None:
    """The files of a local source in order; None: it is a dataset of the hub."""
    name, path = config.dataset.name, Path(_source(config)).expanduser()
    if name == "wiki-leads" and not path.exists():
        raise DataError(f"the packaged corpus {path} is missing; make it with: python tools/prepare_demo.py")
    if not path.exists():
        if _kind(path) or name.startswith((".", "/", "~")):
            raise DataError(f"dataset.name={name}: no such file or folder")
        return None
    if config.dataset.val_split:
        raise DataError(f"dataset.val_split is for datasets of the hub; {name} is divided by dataset.val_fraction, so leave it null")
    files = sorted(p for p in path.rglob("*") if _kind(p)) if path.is_dir() else [path]
    kinds = {_kind(p) for p in files}
    if len(kinds) != 1 or None in kinds:
        found = "several kinds of files" if len(kinds) > 1 else "no file that can be read"
        raise DataError(f"dataset.name={name} holds {found}; give .txt, .json or .jsonl, or .parquet files of one kind")
    return files


def _kind(path: Path) -> str | None:
    return _KINDS.get(Path(path.name.removesuffix(".zst")).suffix)


def _has_blank_line(files: list[Path]) -> bool:
    for path in files:
        with (zstandard.open if path.suffix == ".zst" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            if any(not line.strip() for line in file):
                return True
    return False
