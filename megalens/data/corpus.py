"""Where the text comes from: the packaged corpus, local files, or the Hugging Face hub; cleaned, and divided by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import xxhash
import zstandard
from datasets.data_files import DataFilesDict, DataFilesList

from megalens.config import Config
from megalens.data import DataError
from megalens.data.compressed import is_whole
from megalens.data.local_files import kind_of, local_files, source_fingerprint, source_name
from megalens.data.paragraphs import text_documents
from megalens.device import usable_cores

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
        raise DataError(f"{source_name(config)} has a single usable document; nothing is left to hold out for validation")
    held_out = (draw < settings.val_fraction * 2.0**63) | (draw == draw.min())
    held_out &= draw != draw.max()
    train = train.remove_columns("draw")
    return {"train": train.select(np.flatnonzero(~held_out)), "val": train.select(np.flatnonzero(held_out))}


def is_stream(config: Config) -> bool:
    """Is the corpus read as a stream (``pretokenize.streaming``, or compressed files)?"""
    return config.pretokenize.streaming or any(path.suffix == ".zst" for path in local_files(config) or [])


def stream_documents(config: Config, split: str) -> Iterator[tuple[int, str]]:
    """The usable documents of ``train`` or ``val`` one by one, as ``doc_id`` and text; nothing is kept on the disk.

    The same documents as :func:`load_documents` gives. But where the corpus is so small that one side stays empty, it stays empty.

    Raises:
        DataError: the source is missing or unreadable, or lacks the column.
    """
    settings, column = config.dataset, config.dataset.text_column
    own_split = settings.val_split if split == "val" else None
    with _reading(config):
        rows = _stream(config, own_split or settings.split)
        other, is_text = None, False
        for doc_id, row in enumerate(islice(rows, settings.max_documents)):
            _check_column(config, row)
            is_text = is_text or isinstance(row[column], str)
            other = other or (None if is_text or row[column] is None else type(row[column]).__name__)
            mark = _mark({"text": [row[column]]}, settings.min_words, settings.split_seed)
            held_out = not settings.val_split and mark["draw"][0] < settings.val_fraction * 2.0**63
            if mark["usable"][0] and (own_split or held_out == (split == "val")):
                yield doc_id, row[column]
        if other and not is_text:
            raise _no_text(config, other)


def labels_of(config: Config, doc_ids: Sequence[int], columns: Sequence[str], held_out: bool = False) -> dict[str, list[str]]:
    """Further columns of some documents, as strings; empty where the corpus lacks one of them or is read as a stream.

    Args:
        doc_ids: numbers of rows of the source's split.
        held_out: rows of ``dataset.val_split``, where the corpus has one of its own.
    """
    if is_stream(config):
        return {}
    split = config.dataset.val_split if held_out and config.dataset.val_split else config.dataset.split
    with _reading(config):
        found = _load(config, split)
        if not set(columns) <= set(found.column_names) or (len(doc_ids) and max(doc_ids) >= len(found)):
            return {}
        rows = found.select_columns(list(columns)).select(doc_ids)
        return {column: [str(value or "") for value in rows[column]] for column in columns}


def processes(config: Config, documents: int) -> int | None:
    """How many processes ``datasets`` shall use for so many documents; None: this one alone."""
    wanted = min(config.pretokenize.num_proc or usable_cores(), documents // 500)
    return wanted if wanted > 1 else None


def _usable(config: Config, split: str) -> datasets.Dataset:
    """Columns ``text``, ``doc_id`` and ``draw`` (63 random bits that decide the division) of the documents that are kept."""
    settings, column = config.dataset, config.dataset.text_column
    with _reading(config):
        found = _load(config, split)
        _check_column(config, found.column_names)
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
    usable = np.flatnonzero(marks["usable"]) if len(found) else np.array([], np.int64)
    if len(usable) == 0 and len(found) and not any(isinstance(text, str) for text in found["text"]):
        raise _no_text(config, type(next((value for value in found["text"] if value is not None), None)).__name__)
    if len(usable) == 0:
        raise DataError(
            f"{source_name(config)} has no usable document in column '{column}': none of its {len(found)} rows is text of at least "
            f"dataset.min_words={settings.min_words} words"
        )
    texts = found.add_column("doc_id", np.arange(len(found))).add_column("draw", np.asarray(marks["draw"]))
    return texts.select(usable)


def _mark(batch: dict[str, list], min_words: int, seed: int) -> dict[str, list]:
    texts = [text if isinstance(text, str) else "" for text in batch["text"]]
    usable = [len(text.split()) >= max(1, min_words) and _DISAMBIGUATION not in text for text in texts]
    draw = [xxhash.xxh3_64_intdigest(text.encode(errors="replace"), seed=seed % (1 << 63)) >> 1 for text in texts]
    return {"usable": usable, "draw": draw}


def _no_text(config: Config, kind: str) -> DataError:
    """What to say of a column of which no row is text."""
    holds = {"list": "lists", "dict": "objects", "NoneType": "nothing"}.get(kind, f"values of type {kind}")
    what = f"column '{config.dataset.text_column}' of {source_name(config)} holds {holds}, not text"
    return DataError(f"{what}; name a column of text with dataset.text_column, or write each row's text as one string")


def _check_column(config: Config, columns) -> None:
    if config.dataset.text_column not in columns:
        has = f"{source_name(config)} has no column '{config.dataset.text_column}'"
        raise DataError(f"{has}; set dataset.text_column to one of: {', '.join(columns)}")


# -------------------------------------------------------------------------------------------------------------- reading


def _load(config: Config, split: str) -> datasets.Dataset:
    files = local_files(config)
    if files is None:
        return datasets.load_dataset(config.dataset.name, config.dataset.config_name, split=split, streaming=False)
    _check_files(config, files)
    if kind_of(files[0]) == "text":
        arguments = {"files": tuple(files), "content": source_fingerprint(config)}  # its cache goes by the arguments
        return datasets.Dataset.from_generator(_text_rows, features=_TEXT, gen_kwargs=arguments)
    builder = _builder(files)
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _stream(config: Config, split: str) -> Iterator[dict]:
    files = local_files(config)
    if files is None:
        return iter(datasets.load_dataset(config.dataset.name, config.dataset.config_name, split=split, streaming=True))
    _check_files(config, files)
    return _rows_of(files)


def _rows_of(files: list[Path]) -> Iterator[dict]:
    if kind_of(files[0]) == "text":
        return _text_rows(files)
    return iter(_builder(files).as_streaming_dataset("train"))


def _check_files(config: Config, files: list[Path]) -> None:
    """Refuse an empty corpus, which a reader tells in words of its own, and a ``.zst`` that is cut short, which it does not tell.

    Raises:
        DataError: naming the corpus or the file.
    """
    for path in files:
        if path.suffix == ".zst" and path.stat().st_size and not is_whole(path):
            raise DataError(f"cannot read {path}: it is cut short; copy it anew from where it is whole")
    kind = kind_of(files[0])
    if kind == "text":
        has_rows = next(text_documents(files), None) is not None
    elif kind == "parquet" and files[0].suffix == ".parquet":
        has_rows = any(pa.parquet.read_metadata(path).num_rows for path in files)
    else:
        has_rows = any(path.stat().st_size for path in files)
    if not has_rows:
        raise DataError(f"{source_name(config)} is empty: it holds no documents; name another with dataset.name")


_TEXT = datasets.Features({"text": datasets.Value("string")})


def _text_rows(files: Sequence[Path], content: str | None = None) -> Iterator[dict]:
    return ({"text": text} for text in text_documents(files))


def _builder(files: list[Path]) -> datasets.DatasetBuilder:
    """What reads exactly these files; a list of names would be taken as patterns."""
    states = [(path.name, f"{path.stat().st_size} {path.stat().st_mtime_ns}") for path in files]
    listed = DataFilesList([str(path.absolute()) for path in files], states)
    return datasets.load_dataset_builder(kind_of(files[0]), data_files=DataFilesDict({"train": listed}))


@contextmanager
def _reading(config: Config) -> Iterator[None]:
    """Turn what any reader raises into a DataError of one line that names the source."""
    try:
        yield
    except DataError:
        raise
    except _UNREADABLE as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            reason = f"it is not UTF-8 ({cause.reason} at byte 0x{cause.object[cause.start]:02x}); convert it, e.g. with iconv"
        else:
            reason = " ".join(str(cause).split()) or "it is empty"
        if isinstance(cause, _NO_ROWS):
            reason = f"it holds no rows of one kind ({reason})"
        is_local = Path(source_name(config)).expanduser().exists()
        takes = "dataset.name takes wiki-leads, a file or folder, or a dataset of the hub"
        hint = "" if is_local else f" (no local file has that name; {takes})"
        raise DataError(f"cannot read {_unreadable(config) or source_name(config)}: {reason}{hint}") from None


_NO_ROWS = (ArithmeticError, AttributeError, LookupError, TypeError)  # what readers trip over where a file holds no rows of one kind
_UNREADABLE = (OSError, ValueError, StopIteration, pa.ArrowException, zstandard.ZstdError, datasets.exceptions.DatasetsError, *_NO_ROWS)


def _unreadable(config: Config) -> Path | None:
    """Of a folder of files, the first that cannot be read by itself; None: there is none."""
    files = local_files(config) or []
    for path in files if len(files) > 1 else []:
        try:
            for _ in _rows_of([path]):
                pass
        except _UNREADABLE:
            return path
    return None
