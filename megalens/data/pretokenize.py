"""The corpus as token ids, made once: ``data/pretokenized/<dataset>/`` with one Arrow dataset per split and a ``meta.json``."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets

from megalens.config import Config
from megalens.data import DataError
from megalens.data.corpus import is_stream, load_documents, processes, source_fingerprint, stream_documents
from megalens.families.loading import load_tokenizer, tokenizer_fingerprint
from megalens.files import Lock, checksum, explain_full_disk

VERSION = 1
_COLUMNS = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "doc_id": datasets.Value("int64")})


def pretokenize(config: Config) -> Path:
    """Tokenize both splits of the corpus, unless a valid result is there; documents are kept whole.

    Any number of processes may call this at once: one works, the others wait for it. The folder appears when it is complete.
    ``config.force_redump`` makes it anew.

    Returns:
        ``config.pretokenized_dir``, with the columns ``input_ids`` (int32) and ``doc_id`` in ``train`` and ``val``.

    Raises:
        DataError: the corpus is unusable or the disk is full.
    """
    folder, called = config.pretokenized_dir, time.time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Lock(folder.parent / f".{folder.name}.lock"):
        stale = config.force_redump and _made_before(folder, called)
        if not stale and is_current(config) is None:
            return folder
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            _write(config, unfinished)
        except OSError as error:
            raise explain_full_disk(error, folder.parent) from None
        finally:
            if not (unfinished / "meta.json").exists():
                shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder


def is_current(config: Config) -> str | None:
    """Why ``config.pretokenized_dir`` can not serve this configuration; None: it can."""
    folder = config.pretokenized_dir
    if not (folder / "meta.json").exists():
        return f"there is no pretokenized corpus in {folder}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        found, files = {key: meta[key] for key in ("version", "tokenizer", "dataset")}, meta["files"]
    except (ValueError, KeyError):
        return f"{folder / 'meta.json'} is damaged"
    wanted = _identity(config)
    for part in wanted:
        if difference := first_difference(found[part], wanted[part]):
            return f"{folder} was made with another {part} ({difference})"
    for name, file in files.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != file["bytes"]:
            return f"{folder / name} is missing or cut short"
    return None


def tokenizer_identity(config: Config) -> dict:
    """Name and fingerprint of the tokenizer."""
    return {"name": config.tokenizer_name or config.model_label, "fingerprint": tokenizer_fingerprint(load_tokenizer(config))}


def dataset_identity(config: Config, source_may_be_gone: bool = False) -> dict:
    """The dataset's settings and a hash of its local files (``source``; None for the hub's, and left out when the files are gone)."""
    settings = dataclasses.asdict(config.dataset)
    try:
        settings["source"] = source_fingerprint(config)
    except DataError:
        if not source_may_be_gone:
            raise
    if settings.get("source", "") is not None:
        settings["name"] = config.dataset_label
    return settings


def first_difference(found: dict | int, wanted: dict | int) -> str | None:
    """The first thing in which what is there differs from what is wanted, as text; a name beside a fingerprint does not count."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return None if found == wanted else f"{found} there, {wanted} now"
    skipped = {"name"} if "fingerprint" in wanted else set()
    for key in wanted:
        if key not in skipped and found.get(key) != wanted[key]:
            return f"{key}: {found.get(key)} there, {wanted.get(key)} now"
    return None


def load_tokens(config: Config, split: str) -> datasets.Dataset:
    """One split (``train`` or ``val``) of the pretokenized corpus, memory-mapped.

    Raises:
        DataError: it is not there, made with other settings, or damaged.
    """
    mend = "make it with: python tools/pretokenize.py config=..."
    if reason := is_current(config):
        raise DataError(f"{reason}; {mend}")
    folder = config.pretokenized_dir
    for name, file in json.loads((folder / "meta.json").read_text())["files"].items():
        if name.startswith(f"{split}/") and checksum(folder / name) != file["checksum"]:
            raise DataError(f"{folder / name} does not match its checksum: it is damaged; {mend} force_redump=true")
    return datasets.load_from_disk(str(folder / split))


def vocab_size(config: Config) -> int:
    """Tokens of the vocabulary of the pretokenized corpus."""
    return json.loads((config.pretokenized_dir / "meta.json").read_text())["vocab_size"]


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of whole texts, as the subject reads them.

    First what the tokenizer itself puts before every text (a BOS, where it does), then the text's own ids. A special token's name
    inside a text is text. Nothing is put behind it.
    """
    plain = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    start = _start(tokenizer)
    return [start + ids for ids in plain]


def _start(tokenizer) -> list[int]:
    alone, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for first in range(len(whole) - len(alone) + 1):
        if whole[first : first + len(alone)] == alone:
            return whole[:first]
    return []


def _write(config: Config, folder: Path) -> None:
    tokenizer, counts = load_tokenizer(config), {}
    streams = dict.fromkeys(("train", "val")) if is_stream(config) else {}
    for split in streams:
        cache = folder / f"{split}.stream"
        arguments = {"config": config, "split": split, "tokenizer": tokenizer}
        tokens = datasets.Dataset.from_generator(_stream_tokens, features=_COLUMNS, cache_dir=str(cache), gen_kwargs=arguments)
        if len(tokens) == 0:
            raise DataError(f"dataset.name={config.dataset.name} has no usable {split} document; see dataset.min_words and val_fraction")
        counts[split] = _save(tokens, folder / split)
        del tokens
        shutil.rmtree(cache)
    for split, documents in ({} if streams else load_documents(config)).items():
        workers = processes(config, len(documents))
        if workers:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokens = documents.map(
            _encode_batch,
            batched=True,
            remove_columns=["text"],
            features=_COLUMNS,
            fn_kwargs={"tokenizer": tokenizer},
            num_proc=workers,
            cache_file_name=str(folder / f"{split}.cache"),
            desc=f"tokenizing {split}",
        )
        counts[split] = _save(tokens, folder / split)
        del tokens
        for cache in folder.glob(f"{split}*.cache"):
            cache.unlink()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "checksum": checksum(path)} for path in paths}
    meta = {**_identity(config), "vocab_size": len(tokenizer), "splits": counts, "files": files}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def _stream_tokens(config: Config, split: str, tokenizer) -> Iterator[dict]:
    documents = stream_documents(config, split)
    while batch := list(islice(documents, 1000)):
        ids, texts = zip(*batch, strict=True)
        for doc_id, tokens in zip(ids, encode(tokenizer, list(texts)), strict=True):
            yield {"input_ids": tokens, "doc_id": doc_id}


def _save(tokens: datasets.Dataset, folder: Path) -> dict[str, int]:
    """Write one split; returns its counts."""
    tokens.save_to_disk(str(folder))
    return {"documents": len(tokens), "tokens": sum(len(chunk.values) for chunk in tokens.data["input_ids"].chunks)}


def _identity(config: Config) -> dict:
    return {"version": VERSION, "tokenizer": tokenizer_identity(config), "dataset": dataset_identity(config)}


def _encode_batch(batch: dict[str, list], tokenizer) -> dict[str, list]:
    return {"input_ids": encode(tokenizer, batch["text"]), "doc_id": batch["doc_id"]}


def _made_before(folder: Path, moment: float) -> bool:
    meta = folder / "meta.json"
    return meta.exists() and meta.stat().st_mtime < moment
