"""Settings of the text and of the activations that are read from it."""

from __future__ import annotations

from dataclasses import dataclass

from megalens.config.fields import setting


@dataclass
class Dataset:
    """Where the text comes from."""

    name: str = setting(
        "wiki-leads",
        "wiki-leads (packaged corpus), a Hugging Face dataset, or a local .txt/.json/.jsonl/.parquet file or folder, also with .zst behind",
    )
    config_name: str | None = setting(None, "the hub dataset's configuration")
    split: str = setting("train", "the split to read")
    val_split: str | None = setting(None, "a split for validation; null: val_fraction of the documents of split")
    text_column: str = setting("text", "the column that holds the text")
    val_fraction: float = setting(0.1, "share of documents held out when val_split is null")
    split_seed: int = setting(42, "seed of that division by document, and of the positions and row order of the dump")
    max_documents: int | None = setting(None, "read only so many documents; null: all")
    min_words: int = setting(12, "documents with fewer words are dropped")


@dataclass
class Pretokenize:
    """Tokenizing once, before everything else."""

    root: str = setting("data/pretokenized", "folder of the pretokenized corpora")
    num_proc: int | None = setting(None, "processes; null: one per core")
    streaming: bool = setting(False, "read the text as a stream, never kept on disk but as tokens; always so for .zst files")


@dataclass
class Given:
    """Texts from a file, which the terms ``say`` and ``read`` train on."""

    path: str | None = setting(
        None,
        "a .jsonl or .parquet file of texts for the training's rows, by sample_id or by doc_id and position; an epoch gives each text once",
    )
    val_path: str | None = setting(None, "the same for the held-out rows; the validation then uses the rows that have a text; null: none")
    text_column: str = setting("text", "the column that holds a text, or a list of texts")
    spans_column: str = setting(
        "spans", "the column, where there is one, with spans of a text that count more or less: [first, end, weight]"
    )


@dataclass
class ActivationDumper:
    """Reading activations out of the subject into shards."""

    root: str = setting("data/activations", "folder of the dumps: <root>/<model>/layer_<L>/<dataset>_<split>/")
    seq_len: int = setting(64, "tokens of context read per document")
    min_pos: int = setting(8, "earliest token position sampled (0-based)")
    vectors_per_sequence: int = setting(1, "positions sampled per document (fewer where it is shorter)")
    num_samples: int = setting(-1, "rows of the train split; -1: all there are")
    val_num_samples: int = setting(-1, "rows of the validation split; -1: all there are")
    batch_size: int = setting(32, "sequences per forward pass, per rank")
    rows_per_shard: int = setting(16384, "rows of a shard file")
    rows_per_batch: int = setting(1024, "rows of a compressed record batch")
    num_tokens: int = setting(-1, "context tokens that the train split's documents may have in all; -1: no limit")
    layers: list[int] = setting([], "blocks dumped in one pass, a folder each; empty: layer_l alone")
    encoding: str = setting(
        "bf16_planes",
        "bf16 | bf16_planes (high and low bytes apart; compresses better) | int8 (lossy, about 0.9 bytes a value) | fp32",
    )
