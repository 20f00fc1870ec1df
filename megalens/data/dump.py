"""The dump: one pass of the subject over the pretokenized text, one row per sampled position, into shards.

Any number of processes dump together without talking to each other. The configuration fixes the rows, their order and the forward batches
(:mod:`megalens.data.sampling`). A process claims one shard at a time. A process that dies loses its claim, and another makes the shard
again, the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor
from tqdm import tqdm

from megalens.config import Config
from megalens.data import DataError
from megalens.data.encoding import encoding_of
from megalens.data.identity import dump_identity, first_difference
from megalens.data.pretokenize import load_tokens, vocab_size
from megalens.data.sampling import RowOrder, Rows
from megalens.data.shards import REDUMP, ShardWriter, discard, file_problem, read_meta
from megalens.device import resolve_dtype
from megalens.families.loading import check_model, load_tokenizer
from megalens.files import Folder, time_at
from megalens.launcher import rank
from megalens.lens.prompts import check_context, check_tokenizer
from megalens.lens.subject import Subject, load_subject

SPLITS = ("train", "val")


def dump(config: Config) -> None:
    """Make the dumps of both splits and of each of ``activation_dumper.layers``, unless valid ones are there. Every rank calls this.

    With ``config.on_the_fly`` only the validation split is dumped. An unfinished dump is continued. ``config.force_redump`` makes finished
    dumps anew; without it, a finished dump of other settings is left alone and refused.

    Raises:
        DataError: no pretokenized text, fewer rows than asked for, a finished dump of other settings is in the way, a full disk.
        ConfigError: the subject cannot read contexts so long, or has no embedding for an id of the tokenizer.
    """
    encoding_of(config.activation_dumper.encoding)  # refused before anything is loaded
    forced = time_at(Path(config.activation_dumper.root)) if config.force_redump else 0.0
    layers = [dataclasses.replace(config, layer_l=layer) for layer in sorted({*config.activation_dumper.layers} or {config.layer_l})]
    splits = [split for split in SPLITS if split == "val" or not config.on_the_fly]
    todo = {split: [layer for layer in layers if not _kept(layer, split, forced)] for split in splits}
    todo = {split: left for split, left in todo.items() if left}
    if not todo:
        return
    settings = check_model(config)
    check_tokenizer(config, settings, load_tokenizer(config))
    orders, tokens = {}, {}
    for split in todo:
        tokens[split] = load_tokens(config, split)
        orders[split] = row_order(config, split, tokens[split])
    check_context(config, settings)
    subject = load_subject(layers[-1], upto_block=layers[-1].layer_l)
    writers = {split: [_writer(layer, split, orders[split], subject) for layer in left] for split, left in todo.items()}
    _check_space(list(chain(*writers.values())))
    for writer in chain(*writers.values()):
        discard(writer.folder, older_than=forced)
        if note := writer.begin():
            say(note)
    for wait in (False, True):  # first the shards that nobody holds, then those that a killed rank may leave
        for split in todo:
            _work(config, subject, tokens[split], orders[split], writers[split], wait)


def check(config: Config, split: str) -> str | None:
    """Why the dump of ``split`` cannot serve this configuration; None: it can, or none is needed."""
    if split == "train" and (config.on_the_fly or config.mix):
        return None
    folder, want = config.activation_dir(split), config.activation_dumper
    try:
        meta = read_meta(folder)
    except DataError as error:
        return str(error)
    if difference := first_difference(meta, dump_identity(config, split, source_may_be_gone=True)):
        return f"the dump in {folder} has {difference}"
    if encoding_of(meta["encoding"]).values != encoding_of(want.encoding).values:
        return f"the dump in {folder} has another precision (encoding: {meta['encoding']} there, {want.encoding} now)"
    rows = meta.get("rows_available") if _asked(config, split) is None else _asked(config, split)
    if meta["rows"] != rows:
        return f"the dump in {folder} holds {meta['rows']} rows, and {_key(split)} asks for {rows}"
    files = Folder(folder)
    problems = (file_problem(files, shard) for shard in meta["shards"])
    return next((f"{problem}; {REDUMP}" for problem in problems if problem), None)


def row_order(config: Config, split: str, tokens: datasets.Dataset) -> RowOrder:
    """The rows of a split, in the dump's order.

    Raises:
        DataError: the corpus has fewer than were asked for.
    """
    settings, asked = config.activation_dumper, _asked(config, split)
    order = RowOrder(
        np.asarray(tokens.data["doc_id"]),
        pa.compute.list_value_length(tokens.data["input_ids"]).to_numpy().astype(np.int64),
        seed=config.dataset.split_seed,
        seq_len=settings.seq_len,
        min_pos=settings.min_pos,
        per_document=settings.vectors_per_sequence,
        rows_per_shard=settings.rows_per_shard,
        rows=asked,
        tokens=settings.num_tokens if split == "train" and settings.num_tokens != -1 else None,
    )
    if order.available < (asked or 1):
        raise DataError(
            f"activation_dumper.{_key(split)}={asked or -1} cannot be met: {len(tokens)} {split} documents give {order.available} rows at "
            f"seq_len={settings.seq_len}, min_pos={settings.min_pos}, vectors_per_sequence={settings.vectors_per_sequence}, "
            f"num_tokens={settings.num_tokens}; lower it or min_pos, or raise vectors_per_sequence or num_tokens"
        )
    return order


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if rank() == 0:
        print(text, flush=True)


def _key(split: str) -> str:
    return "num_samples" if split == "train" else "val_num_samples"


def _asked(config: Config, split: str) -> int | None:
    number = getattr(config.activation_dumper, _key(split))
    return None if number == -1 else number


def _kept(config: Config, split: str, forced: float) -> bool:
    """Is the dump that is there to be kept? One that is older than ``forced`` is not: only what another rank of this command has made."""
    folder = config.activation_dir(split)
    path = folder / "meta.json"
    if not path.exists() or path.stat().st_mtime < forced:
        return False
    if reason := check(config, split):
        raise DataError(reason if REDUMP in reason else f"{reason}; name another activation_dumper.root, or {REDUMP}")
    shutil.rmtree(folder / ".work", ignore_errors=True)
    say(f"{split}: the {read_meta(folder)['rows']:,} rows in {folder} are valid and kept")
    return True


def _writer(config: Config, split: str, order: RowOrder, subject: Subject) -> ShardWriter:
    settings, vocabulary = config.activation_dumper, vocab_size(config)
    header = {
        **{key: value for key, value in dump_identity(config, split).items() if value is not None},
        "d": subject.d,
        "dtype": resolve_dtype(config),
        "encoding": settings.encoding,
        "token_type": "uint16" if vocabulary <= 1 << 16 else "int32",
        "vocab_size": vocabulary,
        "rows": order.rows,
        "rows_available": order.available,
        "rows_per_shard": settings.rows_per_shard,
        "rows_per_batch": settings.rows_per_batch,
    }
    return ShardWriter(config.activation_dir(split), header)


def _check_space(writers: list[ShardWriter]) -> None:
    """Say how large the dumps will be, and refuse to start what cannot fit."""
    needed = 0
    for writer in writers:
        head = writer.header
        context = (head["seq_len"] + head["min_pos"]) / 2 * (2 if head["token_type"] == "uint16" else 4)
        size = head["rows"] * (head["d"] * encoding_of(head["encoding"]).bytes_per_value + context)
        rows = f"{head['rows']:,} rows of width {head['d']} in {writer.num_shards:,} shards"
        say(f"{head['split']}: {rows}, about {_size(size)}, to {writer.folder}")
        needed += size * (1 - writer.rows_written() / head["rows"])
    folder = next(parent for parent in writer.folder.parents if parent.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise DataError(
            f"the dump needs about {_size(needed)} and {_size(free)} are free on the disk of {folder}; free some, lower "
            "activation_dumper.num_samples, or name another activation_dumper.root"
        )


def _size(count: float) -> str:
    unit, name = next((u, n) for u, n in [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")] if count >= u or u == 1)
    return f"{count / unit:.3g} {name}"


def _work(config: Config, subject: Subject, tokens: datasets.Dataset, order: RowOrder, writers: list[ShardWriter], wait: bool) -> None:
    """Make the shards that can be claimed, one being written while the next is read out; the last rank to leave writes ``meta.json``."""
    written = min(writer.rows_written() for writer in writers)
    if written == order.rows and all([writer.finish() for writer in writers]):
        return

    def first_activations(number: int) -> Tensor:
        return _read_out(config, subject, tokens, order.shard(0), writers)["activations"][number]

    for number, writer in enumerate(writers):
        writer.calibrate(partial(first_activations, number))
    label = f"dumping {writers[0].header['split']}"
    with tqdm(total=order.rows, initial=written, unit="row", desc=label, disable=rank() != 0, smoothing=0.05) as bar:
        with ThreadPoolExecutor(1) as background:
            pending = None
            for index in range(writers[0].num_shards):
                with ExitStack() as locks:
                    claimed = _claim(writers, index, wait, locks)
                    if not claimed:
                        continue
                    rows = _read_out(config, subject, tokens, order.shard(index), claimed, bar.update)
                    if pending is not None:
                        pending.result()
                    pending = background.submit(_store, claimed, index, rows, locks.pop_all())
                bar.n = max(bar.n, min(writer.rows_written() for writer in writers))
                bar.set_postfix_str(f"{_size(sum(writer.bytes_written() for writer in writers))} written", refresh=False)
            if pending is not None:
                pending.result()
        bar.n = min(writer.rows_written() for writer in writers)
    for writer in writers:
        writer.finish()


def _claim(writers: list[ShardWriter], index: int, wait: bool, locks: ExitStack) -> list[ShardWriter]:
    """The layers whose shard ``index`` is ours to write, until ``locks`` is closed."""
    claimed = []
    for writer in writers:
        if lock := writer.claim(index, wait):
            locks.callback(lock.release)
            claimed.append(writer)
    return claimed


def _store(writers: list[ShardWriter], index: int, rows: dict, locks: ExitStack) -> None:
    with locks:
        for writer, activation_ND in zip(writers, rows.pop("activations"), strict=True):
            writer.write(index, {**rows, "activation": activation_ND.cpu()})


def _read_out(
    config: Config,
    subject: Subject,
    tokens: datasets.Dataset,
    rows: Rows,
    writers: list[ShardWriter],
    progress: Callable[[int], object] = lambda count: None,
) -> dict:
    """The rows of one shard: ``activations``, one ``[N, D]`` for each writer's layer, and what all layers share."""
    (ids_KC, doc_id_K), batches = forward_batches(config, tokens, rows)
    activations: list[Tensor] = []
    for ids_BC, index in batches:
        index = index.to(subject.device)
        residuals = subject.residuals(ids_BC.to(subject.device), [writer.header["layer"] for writer in writers])
        if not activations:
            activations = [resid_BCD.new_empty(len(rows.position_N), resid_BCD.shape[-1]) for resid_BCD in residuals]
        for activation_ND, resid_BCD in zip(activations, residuals, strict=True):
            activation_ND[index[0]] = resid_BCD[index[1], index[2]]
        progress(index.shape[1])
    return {
        "activations": activations,
        "input_ids": torch.from_numpy(ids_KC[rows.document_N]),
        "position": torch.from_numpy(rows.position_N),
        "doc_id": torch.from_numpy(doc_id_K[rows.document_N]),
    }


def forward_batches(
    config: Config, tokens: datasets.Dataset, rows: Rows
) -> tuple[tuple[np.ndarray, np.ndarray], Iterator[tuple[Tensor, Tensor]]]:
    """What the subject reads for some rows: documents of like length together, each batch cut behind its last sampled position.

    Returns:
        the documents' token ids ``[K, seq_len]`` and ``doc_id``; and for each batch its ids ``[B, C]`` and, for each row in it, the row's
        place in the shard, its document in the batch, and its position ``[3, rows]``.
    """
    settings = config.activation_dumper
    contexts = contexts_of(tokens, rows.source_K, settings.seq_len)
    length_K = np.zeros(len(rows.source_K), np.int64)
    np.maximum.at(length_K, rows.document_N, rows.position_N + 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for documents, members, places in _groups(rows, length_K, settings.batch_size):
            width = min(settings.seq_len, -(-int(length_K[documents].max()) // 8) * 8)
            ids_BC = torch.from_numpy(contexts[0][documents, :width]).long()
            yield ids_BC, torch.from_numpy(np.stack([places, members, rows.position_N[places]]))

    return contexts, batches()


def _groups(rows: Rows, length_K: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents of a forward batch, longest last; for each of their rows, which of these documents it is of, and its place in the shard."""
    order = np.argsort(length_K, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    rank_N = rank[rows.document_N]
    places = np.argsort(rank_N, kind="stable")
    for first in range(0, len(order), batch_size):
        begin, end = np.searchsorted(rank_N[places], [first, first + batch_size])
        yield order[first : first + batch_size], rank_N[places[begin:end]] - first, places[begin:end]


def contexts_of(tokens: datasets.Dataset, source_K: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[K, seq_len]`` int32 of documents, cut or padded with 0, and their ``doc_id``."""
    table = tokens.with_format("arrow")[source_K]
    lists = table["input_ids"].combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    length_K = np.minimum(np.diff(offsets), seq_len)
    column = np.arange(seq_len)
    inside = column < length_K[:, None]
    ids_KC = np.zeros((len(source_K), seq_len), np.int32)
    ids_KC[inside] = values[(offsets[:-1, None] + column)[inside]]
    return ids_KC, table["doc_id"].to_numpy()
