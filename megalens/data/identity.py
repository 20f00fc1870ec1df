"""What identifies a dump, its tokens and its model: the one list that writers write and readers compare."""

from __future__ import annotations

import dataclasses

from megalens.config import Config
from megalens.data import DataError
from megalens.data.local_files import source_fingerprint
from megalens.families.loading import load_tokenizer, subject_fingerprint, tokenizer_fingerprint


def dump_identity(config: Config, split: str, source_may_be_gone: bool = False) -> dict:
    """What two dumps of ``split`` (``train`` or ``val``) must share to hold the same rows; keys of ``meta.json``.

    How many of the rows there are (``rows``) and how they are stored (``encoding``, ``rows_per_shard``) is not part of it.
    """
    settings = config.activation_dumper
    limited = split == "train" and settings.num_tokens != -1
    return {
        **model_identity(config),
        "split": split,
        "seed": config.dataset.split_seed,
        "seq_len": settings.seq_len,
        "min_pos": settings.min_pos,
        "vectors_per_sequence": settings.vectors_per_sequence,
        "num_tokens": settings.num_tokens if limited else None,
        "dataset": dataset_identity(config, source_may_be_gone),
    }


def model_identity(config: Config) -> dict:
    """What activations are read with: the part of :func:`dump_identity` that a lens must share."""
    return {
        "subject": {"name": config.model_label, "fingerprint": subject_fingerprint(config)},
        "tokenizer": tokenizer_identity(config),
        "layer": config.layer_l,
    }


def tokenizer_identity(config: Config) -> dict:
    """Name and fingerprint of the tokenizer."""
    return {"name": config.tokenizer_name or config.model_label, "fingerprint": tokenizer_fingerprint(load_tokenizer(config))}


def dataset_identity(config: Config, source_may_be_gone: bool = False) -> dict:
    """The dataset's settings and ``source``, a hash of its local files: None for a dataset of the hub.

    Args:
        source_may_be_gone: leave ``source`` out when the files are gone, instead of raising a DataError.
    """
    settings = dataclasses.asdict(config.dataset)
    try:
        settings["source"] = source_fingerprint(config)
    except DataError:
        if not source_may_be_gone:
            raise
    if settings.get("source", "") is not None:
        settings["name"] = config.dataset_label
    return settings


def first_difference(found: dict, wanted: dict) -> str | None:
    """Describe the first key whose stored value differs; None: no key of ``wanted`` does.

    A missing key counts as None. Where ``wanted`` has a fingerprint, the name beside it is not compared.
    """
    for key, value in wanted.items():
        if (detail := _detail(found.get(key), value)) is not None:
            return f"another {key} ({detail})"
    return None


def _detail(found, wanted) -> str | None:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return None if found == wanted else f"{_text(found)} there, {_text(wanted)} now"
    keys = [key for key in wanted if key != "name" or "fingerprint" not in wanted]
    differs = next((key for key in keys if found.get(key) != wanted[key]), None)
    return None if differs is None else f"{differs}: {_text(found.get(differs))} there, {_text(wanted[differs])} now"


def _text(value) -> str:
    return "none" if value is None else str(value)
