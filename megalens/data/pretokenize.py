"""The corpus as token ids, made once: ``data/pretokenized/<dataset>/<tokenizer>/`` with one Arrow dataset per split and a ``meta.json``."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from megalens.config import Config
from megalens.data import DataError
from megalens.data.corpus import is_stream, load_documents, processes, stream_documents
from megalens.data.identity import dataset_identity, first_difference, tokenizer_identity
from megalens.families.loading import load_tokenizer, model_settings
from megalens.files import Lock, checksum, explain_full_disk, save_json, time_at
from megalens.launcher import launcher_age
from megalens.lens.prompts import check_tokenizer

VERSION = 1
_COLUMNS = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "doc_id": datasets.Value("int64")})


def pretokenize(config: Config) -> Path:
    """Tokenize both splits of the corpus, unless a valid result is there; documents are kept whole.

    Any number of processes may call this at once: one works, the others wait for it. The folder appears when it is complete. Tokens of
    another corpus or tokenizer that lie there are not touched without ``config.force_redump``, which makes them anew.

    Returns:
        ``config.pretokenized_dir``, with the columns ``input_ids`` (int32) and ``doc_id`` in ``train`` and ``val``.

    Raises:
        DataError: the corpus is unusable, whole tokens of other settings are in the way, or the disk is full.
        ConfigError: there is no such model or tokenizer, or the model has no embedding for an id of the tokenizer.
    """
    folder = config.pretokenized_dir
    folder.parent.mkdir(parents=True, exist_ok=True)
    forced = time_at(folder.parent) - launcher_age() if config.force_redump else 0.0
    with Lock(folder.parent / f".{folder.name}.lock"):
        if not _made_before(folder, forced):
            if why_stale(config) is None:
                return folder
            _refuse_to_replace(config)
        tokenizer = load_tokenizer(config)
        check_tokenizer(config, model_settings(config), tokenizer)
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            _write(config, unfinished, tokenizer)
        except OSError as error:
            raise explain_full_disk(error, folder.parent) from None
        finally:
            if not (unfinished / "meta.json").exists():
                shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    return folder


def why_stale(config: Config) -> str | None:
    """Why ``config.pretokenized_dir`` cannot serve this configuration; None: it can."""
    folder = config.pretokenized_dir
    if not (folder / "meta.json").exists():
        return f"there is no pretokenized corpus in {folder}" + _note_on_earlier_place(folder.parent)
    meta = _read_meta(folder)
    if meta is None:
        return f"{folder / 'meta.json'} is damaged"
    if difference := first_difference(meta, _identity(config)):
        return f"{folder} was made with {difference}"
    return _first_damage(folder, meta)


def _refuse_to_replace(config: Config) -> None:
    """Raise a DataError when the folder holds whole tokens of other settings: they may be another run's."""
    folder = config.pretokenized_dir
    meta = _read_meta(folder) if (folder / "meta.json").exists() else None
    if meta is not None and _first_damage(folder, meta) is None and (difference := first_difference(meta, _identity(config))):
        raise DataError(f"{folder} was made with {difference}; name another pretokenize.root, or make it anew with force_redump=true")


def _read_meta(folder: Path) -> dict | None:
    """``meta.json``; None: it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return meta if meta.keys() >= {"version", "tokenizer", "dataset", "vocab_size", "files"} else None
    except (ValueError, AttributeError):
        return None


def _first_damage(folder: Path, meta: dict) -> str | None:
    for name, file in meta["files"].items():
        if not (folder / name).exists() or (folder / name).stat().st_size != file["bytes"]:
            return f"{folder / name} is missing or cut short"
    return None


def _note_on_earlier_place(folder: Path) -> str:
    is_there = (folder / "meta.json").is_file() and (folder / "train").is_dir()
    return f" (the one in {folder} itself is of an earlier version; it is left alone and may be removed)" if is_there else ""


def load_tokens(config: Config, split: str) -> datasets.Dataset:
    """One split (``train`` or ``val``) of the pretokenized corpus, memory-mapped.

    Raises:
        DataError: it is not there, made with other settings, or damaged.
    """
    mend = "make it with: python tools/pretokenize.py config=..."
    if reason := why_stale(config):
        raise DataError(f"{reason}; {mend}")
    folder = config.pretokenized_dir
    for name, file in json.loads((folder / "meta.json").read_text())["files"].items():
        if name.startswith(f"{split}/") and checksum(folder / name) != file["checksum"]:
            raise DataError(f"{folder / name} does not match its checksum: it is damaged; {mend} force_redump=true")
    return datasets.load_from_disk(str(folder / split))


def tokens_checksums(config: Config, split: str) -> list[str]:
    """Checksums of the files that hold the tokens of a split."""
    files = json.loads((config.pretokenized_dir / "meta.json").read_text())["files"]
    return [files[name]["checksum"] for name in sorted(files) if name.startswith(f"{split}/") and name.endswith(".arrow")]


def vocab_size(config: Config) -> int:
    """Tokens of the vocabulary of the pretokenized corpus."""
    return json.loads((config.pretokenized_dir / "meta.json").read_text())["vocab_size"]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
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


def _write(config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    counts = (_write_streams if is_stream(config) else _write_documents)(config, folder, tokenizer)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "checksum": checksum(path)} for path in paths}
    meta = {**_identity(config), "vocab_size": len(tokenizer), "splits": counts, "files": files}
    save_json(folder / "meta.json", meta)


def _write_documents(config: Config, folder: Path, tokenizer) -> dict[str, dict]:
    """Write both splits of a corpus that lies on the disk; returns their counts."""
    counts = {}
    for split, documents in load_documents(config).items():
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
    return counts


def _write_streams(config: Config, folder: Path, tokenizer) -> dict[str, dict]:
    """The same for a corpus that is read as it comes."""
    counts = {}
    for split in ("train", "val"):
        cache, documents = folder / f"{split}.stream", stream_documents(config, split)
        with ArrowWriter(features=_COLUMNS, path=str(cache)) as writer:
            while batch := list(islice(documents, 1000)):
                ids, texts = zip(*batch, strict=True)
                writer.write_batch({"input_ids": encode(tokenizer, list(texts)), "doc_id": list(ids)})
            if writer.finalize()[0] == 0:
                hint = "lower dataset.min_words, or set dataset.val_fraction"
                raise DataError(f"dataset.name={config.dataset.name} has no usable {split} document; {hint}")
        tokens = datasets.Dataset.from_file(str(cache))
        counts[split] = _save(tokens, folder / split)
        del tokens
        cache.unlink()
    return counts


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
