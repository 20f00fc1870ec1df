"""Where a training's rows come from: its own dump, a mixture of dumps, or the subject itself as the training goes."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalens.config import Config, ConfigError
from megalens.data import DataError
from megalens.data.dump import row_order
from megalens.data.identity import dump_identity, first_difference, model_identity
from megalens.data.loader import ActivationLoader, Reader
from megalens.data.pretokenize import load_tokens, tokens_checksums
from megalens.data.read_out import Contexts, ReadOut
from megalens.data.sampling import Rows
from megalens.data.shards import ShardReader, batch_sizes
from megalens.data.texts import with_texts
from megalens.families.loading import check_model
from megalens.lens.subject import load_to_read
from megalens.statistics import ActivationStatistics

_STATISTICS_ROWS = 4096


def training_loader(config: Config, rank: int = 0, world_size: int = 1) -> ActivationLoader:
    """This rank's batches, as ``on_the_fly`` and ``mix`` say.

    Raises:
        DataError: a dump or the pretokenized text is missing, or of another model or layer.
        ConfigError: an entry of ``mix`` is no FOLDER=SHARE.
    """
    dumps: dict[str, float] | Path = mixture(config) or config.activation_dir("train")
    source: Reader | dict[str, float] | Path = ContextReader(config, "train") if config.on_the_fly else dumps
    if config.given.path is not None:
        source = with_texts(config, ShardReader(source) if isinstance(source, Path) else source, "train", tell=rank == 0)
    loader = ActivationLoader(source, config.batch_size, config.seed, rank, world_size, workers=config.loader_workers)
    if config.mix:
        wanted = model_identity(config)
        for reader in loader.readers:
            reader.check_matches(wanted)
    return loader


def held_out_loader(config: Config, rank: int = 0) -> ActivationLoader:
    """The rows of the validation dump; those that have a text, where ``given.val_path`` gives some.

    Raises:
        DataError: there is no such dump, or its texts cannot be read.
    """
    folder: Any = config.activation_dir("val")
    source = with_texts(config, ShardReader(folder), "val", tell=rank == 0) if config.given.val_path is not None else folder
    return ActivationLoader(source, 1, config.seed)


def mixture(config: Config) -> dict[str, float]:
    """The folders of ``mix`` and their shares."""
    shares = {}
    for entry in config.mix:
        folder, _, share = entry.rpartition("=")
        try:
            shares[folder] = float(share)
        except ValueError:
            raise ConfigError(f"mix: '{entry}' is no FOLDER=SHARE, e.g. data/activations/<model>/layer_<L>/<dataset>_train=0.7") from None
    return shares


class ContextReader:
    """The rows of a dump, in its order, without its activations: the lens reads them from the subject, in the pass its KL term needs
    anyway. Nothing but the pretokenized text has to be there.

    Takes the place of a :class:`~megalens.data.shards.ShardReader` in a loader and gives the same batches, but for ``activation``.

    Attributes:
        statistics: of the first rows' activations (at most 4096), read from the subject when first asked for.

    Raises:
        DataError: there is no pretokenized text, or fewer rows than were asked for.
    """

    def __init__(self, config: Config, split: str):
        self.folder: str | Path = Path(f"{config.dataset_label}_{split}")
        settings = config.activation_dumper
        self._config, self._tokens = config, load_tokens(config, split)
        self._order = row_order(config, split, self._tokens)
        self.meta: dict[str, Any] = {
            **dump_identity(config, split),
            "d": check_model(config).get_text_config().hidden_size,
            "encoding": settings.encoding,
            "rows": self._order.rows,
            "rows_per_shard": settings.rows_per_shard,
            "rows_per_batch": settings.rows_per_batch,
        }
        self.identity = hashlib.sha256(json.dumps([self.meta, tokens_checksums(config, split)]).encode()).hexdigest()[:16]
        sizes = [
            batch_sizes(min(settings.rows_per_shard, self._order.rows - first), settings.rows_per_batch)
            for first in range(0, self._order.rows, settings.rows_per_shard)
        ]
        self.batch_rows = np.concatenate(sizes)
        self._batches = [(shard, i * settings.rows_per_batch) for shard, rows in enumerate(sizes) for i in range(len(rows))]
        self._shards: dict[int, Rows] = {}  # the last few; a plain dictionary, so that worker processes can be sent a reader

    def __len__(self) -> int:
        return self._order.rows

    def _shard(self, number: int) -> Rows:
        if number not in self._shards:
            while len(self._shards) >= 8:
                del self._shards[next(iter(self._shards))]
            self._shards[number] = self._order.shard(number)
        return self._shards[number]

    def read_batch(self, index: int) -> dict[str, Tensor]:
        """What :meth:`ShardReader.read_batch` gives, without ``activation``."""
        shard, first = self._batches[index]
        part, rows = slice(first, first + int(self.batch_rows[index])), self._shard(shard)
        documents, member_N = np.unique(rows.document_N[part], return_inverse=True)
        contexts = Contexts(self._tokens, rows.source_K[documents], self.meta["seq_len"])
        position_N = rows.position_N[part]
        ids_NC = contexts.padded(member_N, contexts.seq_len) * (np.arange(contexts.seq_len) <= position_N[:, None])
        return {
            "input_ids": torch.from_numpy(ids_NC.astype(np.int32)),
            "position": torch.from_numpy(position_N),
            "doc_id": torch.from_numpy(contexts.doc_id_K[member_N]),
            "sample_id": torch.arange(len(position_N)) + shard * self.meta["rows_per_shard"] + first,
        }

    def column(self, name: str) -> np.ndarray:
        """One number per row (``doc_id``, ``position``, ``sample_id``), all rows."""
        return np.concatenate([self.read_batch(index)[name].numpy() for index in range(len(self.batch_rows))])

    def check_matches(self, wanted: dict) -> None:
        """Refuse what is of another model, tokenizer or layer.

        Raises:
            DataError: naming the first key that differs.
        """
        if difference := first_difference(self.meta, wanted):
            raise DataError(f"the rows of {self.folder} are of {difference}")

    @functools.cached_property
    def statistics(self) -> ActivationStatistics:
        """Of the first rows' activations (at most 4096), read from the subject when first asked for.

        Under an engine that shards weights all ranks must ask, since they read together.
        """
        reader, rows = ReadOut(self._config, *load_to_read(self._config)), self._shard(0)
        documents, member_N = np.unique(rows.document_N[:_STATISTICS_ROWS], return_inverse=True)
        some = Rows(member_N, rows.position_N[:_STATISTICS_ROWS], rows.source_K[documents])
        if not len(member_N):
            raise DataError(f"{self.folder} has no rows to take statistics of; ask for more (activation_dumper.num_samples)")
        moments = reader.moments(self._tokens, some)
        reader.ranks.close()
        return ActivationStatistics.from_meta(moments.statistics().to_meta())
