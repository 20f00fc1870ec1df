"""The dump: one pass of the subject over the pretokenized text, one row per sampled position, into shards.

Any number of processes dump together without talking to each other. The configuration fixes the rows, their order and the forward batches
(:mod:`megalens.data.sampling`). A process claims one shard at a time. A process that dies loses its claim, and another makes the shard
again, the same to the last bit.

Under an engine that shards weights, the ranks of a launch are one such process: its rank 0 claims and writes, all of them read.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from megalens.config import Config
from megalens.data import DataError
from megalens.data.encoding import encoding_of
from megalens.data.identity import dump_identity, first_difference
from megalens.data.pretokenize import load_tokens, vocab_size
from megalens.data.read_out import ReadOut
from megalens.data.sampling import RowOrder
from megalens.data.shards import REDUMP, ShardWriter, discard, file_problem, read_meta
from megalens.device import resolve_device, resolve_dtype
from megalens.engine import Ranks, sharers
from megalens.families.loading import check_model, load_tokenizer
from megalens.files import Folder, time_at
from megalens.launcher import launcher_age, rank
from megalens.lens.prompts import check_context, check_tokenizer
from megalens.lens.subject import Subject, load_to_read

SPLITS = ("train", "val")
_PATIENCE = 0.2  # seconds between two looks at a shard that another process holds


def dump(config: Config) -> None:
    """Make the dumps of both splits and of each of ``activation_dumper.layers``, unless valid ones are there. Every rank calls this.

    With ``config.on_the_fly`` only the validation split is dumped. An unfinished dump is continued. ``config.force_redump`` makes finished
    dumps anew; without it, a finished dump of other settings is left alone and refused.

    Raises:
        DataError: no pretokenized text, fewer rows than asked for, a finished dump of other settings is in the way, a full disk.
        ConfigError: the subject cannot read contexts so long, or has no embedding for an id of the tokenizer.
    """
    encoding_of(config.activation_dumper.encoding)  # refused before anything is loaded
    forced = time_at(Path(config.activation_dumper.root)) - launcher_age() if config.force_redump else 0.0
    layers = [dataclasses.replace(config, layer_l=layer) for layer in sorted({*config.activation_dumper.layers} or {config.layer_l})]
    splits = [split for split in SPLITS if split == "val" or not config.on_the_fly]
    ranks = sharers(config, resolve_device(config.device))
    todo = ranks.by_main(lambda: {split: [layer for layer in layers if not _kept(layer, split, forced)] for split in splits})
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
    reader = ReadOut(config, *load_to_read(layers[-1]))
    writers = {split: [_writer(layer, split, orders[split], reader.subject) for layer in left] for split, left in todo.items()}
    reader.ranks.by_main(partial(_begin, list(chain(*writers.values())), forced))
    for wait in (False, True):  # first the shards that nobody holds, then those that a killed process may leave
        for split in todo:
            _work(reader, tokens[split], orders[split], writers[split], wait)
    reader.ranks.close()


def _begin(writers: list[ShardWriter], forced: float) -> None:
    _check_space(writers)
    for writer in writers:
        discard(writer.folder, older_than=forced)
        if note := writer.begin():
            say(note)


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


def _work(reader: ReadOut, tokens: datasets.Dataset, order: RowOrder, writers: list[ShardWriter], wait: bool) -> None:
    """Make the shards that can be claimed, one being written while the next is read out; the last rank to leave writes ``meta.json``.

    Ranks that share the subject read each shard together; their rank 0 alone claims and writes.

    Args:
        wait: also wait for those that others hold, and may leave.
    """
    ranks = reader.ranks
    if ranks.by_main(lambda: _rows_written(writers) == order.rows and all([writer.finish() for writer in writers])):
        return
    _calibrate(reader, tokens, order, writers)
    label, written = f"dumping {writers[0].header['split']}", _rows_written(writers) if ranks.is_main else 0
    with tqdm(total=order.rows, initial=written, unit="row", desc=label, disable=rank() != 0, smoothing=0.05) as bar:
        with ThreadPoolExecutor(1) as background:
            pending = None
            for index in range(writers[0].num_shards):
                for claimed, locks in _claims(ranks, writers, index, wait):
                    with locks:
                        layers = [writer.header["layer"] for writer in claimed]
                        rows = reader.rows(tokens, order.shard(index), layers, lambda count: bar.update(count * ranks.data_ranks))
                        if pending is not None:
                            pending.result()
                        if ranks.is_main:
                            pending = background.submit(_store, claimed, index, rows, locks.pop_all())
                if ranks.is_main:
                    bar.n = max(bar.n, _rows_written(writers))
                    bar.set_postfix_str(f"{_size(sum(writer.bytes_written() for writer in writers))} written", refresh=False)
            if pending is not None:
                pending.result()
        bar.n = _rows_written(writers)
    ranks.by_main(lambda: all([writer.finish() for writer in writers]))


def _rows_written(writers: list[ShardWriter]) -> int:
    return min(writer.rows_written() for writer in writers)


def _calibrate(reader: ReadOut, tokens: datasets.Dataset, order: RowOrder, writers: list[ShardWriter]) -> None:
    """For encodings with a scale: take that of the first shard's activations, unless another process has."""
    for writer in writers:
        if reader.ranks.by_main(lambda writer=writer: writer.needs_scale()):  # type: ignore[misc]
            rows = reader.rows(tokens, order.shard(0), [writer.header["layer"]])
            if reader.ranks.is_main:
                writer.calibrate(rows["activations"][0])


def _claims(ranks: Ranks, writers: list[ShardWriter], index: int, wait: bool) -> Iterator[tuple[list[ShardWriter], ExitStack]]:
    """The layers whose shard ``index`` is ours to write until the locks beside them are closed; several times where some are awaited."""
    left = set(range(len(writers)))
    while left:
        locks = ExitStack()

        def claim(left: set[int], locks: ExitStack) -> tuple[list[int], list[int]]:
            claimed = []
            for number in sorted(left):
                if lock := writers[number].claim(index):
                    locks.callback(lock.release)
                    claimed.append(number)
            return claimed, [number for number in left if writers[number].is_written(index)]

        claimed, written = ranks.by_main(partial(claim, left, locks))
        left -= {*claimed, *written}
        if claimed:
            yield [writers[number] for number in claimed], locks
        elif not wait:
            return
        elif left:
            time.sleep(_PATIENCE)


def _store(writers: list[ShardWriter], index: int, rows: dict, locks: ExitStack) -> None:
    with locks:
        for writer, activation_ND in zip(writers, rows.pop("activations"), strict=True):
            writer.write(index, {**rows, "activation": activation_ND.cpu()})
