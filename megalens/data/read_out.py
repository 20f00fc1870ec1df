"""Rows read out of the subject: the documents they are of, the forward batches, and the ranks that read them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from megalens.config import Config
from megalens.data.moments import Moments
from megalens.data.sampling import Rows
from megalens.engine import Ranks
from megalens.lens.subject import Subject


class Contexts:
    """Token ids of some documents, cut to ``seq_len``; a view of the pretokenized text, of which only what is asked for is copied.

    Args:
        tokens: a split of the pretokenized corpus.
        source_K: the documents, as row numbers of it.
        seq_len: tokens of each at most.

    Attributes:
        doc_id_K: their ids.
    """

    def __init__(self, tokens: datasets.Dataset, source_K: np.ndarray, seq_len: int):
        lists, self.seq_len = tokens.data["input_ids"].chunks, seq_len
        first_of = np.cumsum([0, *map(len, lists)])
        self._chunk_K = np.searchsorted(first_of, source_K, side="right") - 1
        self._values, self._begin_K, self._end_K = {}, np.zeros(len(source_K), np.int64), np.zeros(len(source_K), np.int64)
        for chunk in np.unique(self._chunk_K):
            here = np.flatnonzero(self._chunk_K == chunk)
            offsets, row = lists[chunk].offsets.to_numpy(), source_K[here] - first_of[chunk]
            self._values[chunk] = lists[chunk].values.to_numpy()
            self._begin_K[here], self._end_K[here] = offsets[row], np.minimum(offsets[row + 1], offsets[row] + seq_len)
        self.doc_id_K = tokens.data["doc_id"].take(pa.array(source_K)).to_numpy()

    def padded(self, documents_B: np.ndarray, width: int) -> np.ndarray:
        """The first ``width`` ids ``[B, width]`` (int32) of some of the documents, 0 behind their end."""
        ids_BC = np.zeros((len(documents_B), width), np.int32)
        for ids_C, document in zip(ids_BC, documents_B, strict=True):
            begin, end = self._begin_K[document], self._end_K[document]
            values = self._values[self._chunk_K[document]][begin : min(end, begin + width)]
            ids_C[: len(values)] = values
        return ids_BC


@dataclass(frozen=True)
class RowContexts:
    """The token ids ``[N, C]`` of rows, 0 behind their document's end: made where they are sliced, never all at once."""

    contexts: Contexts
    document_N: np.ndarray
    width: int

    def __getitem__(self, part: slice) -> Tensor:
        return torch.from_numpy(self.contexts.padded(self.document_N[part], self.width))


class ForwardBatches(Sequence):
    """What the subject reads for some rows: documents of like length together, each batch cut behind its last sampled position.

    An item is a batch's ids ``[B, C]`` (int64), and for each row in it the row's place among the rows, its document in the batch, and its
    position ``[3, rows]``.
    """

    def __init__(self, config: Config, contexts: Contexts, rows: Rows):
        self._contexts, self._rows = contexts, rows
        self._length_K = np.zeros(len(rows.source_K), np.int64)
        np.maximum.at(self._length_K, rows.document_N, rows.position_N + 1)
        self._groups = list(_groups(rows, self._length_K, config.activation_dumper.batch_size))

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number):
        documents, members, places = self._groups[number]
        width = min(self._contexts.seq_len, -(-int(self._length_K[documents].max()) // 8) * 8)
        ids_BC = torch.from_numpy(self._contexts.padded(documents, width)).long()
        return ids_BC, torch.from_numpy(np.stack([places, members, self._rows.position_N[places]]))


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


@dataclass(frozen=True)
class ReadOut:
    """Reads rows out of the subject, by all ranks that share it: they divide the forward batches, whose make-up does not depend on them.

    So the rows are the same to the last bit, however many ranks there are; but for ``fsdp.tensor_ranks``, which divides the sums inside a
    block.
    """

    config: Config
    subject: Subject
    ranks: Ranks

    def rows(self, tokens: datasets.Dataset, rows: Rows, layers: list[int], progress: Callable[[int], object] = lambda count: None) -> dict:
        """Some rows as :meth:`ShardWriter.write` takes them, but for ``activations``, one ``[N, D]`` for each of some layers (ascending).

        Every rank calls this. Rank 0 has all activations, another rank those that it has read.
        """
        contexts = Contexts(tokens, rows.source_K, self.config.activation_dumper.seq_len)
        batches = ForwardBatches(self.config, contexts, rows)
        activations: list[Tensor] = []

        def read(number: int, counts: bool) -> None:
            ids_BC, index = batches[number]
            index = index.to(self.ranks.device)
            for layer, resid_BCD in enumerate(self.subject.residuals(ids_BC.to(self.ranks.device), layers)):
                if layer == len(activations):
                    activations.append(resid_BCD.new_zeros(len(rows.position_N), resid_BCD.shape[-1]))
                if counts:
                    activations[layer][index[0]] = resid_BCD[index[1], index[2]]
            progress(index.shape[1])

        self.ranks.divide(len(batches), read)
        for activation_ND in activations:
            self.ranks.join_parts(activation_ND)
        return {
            "activations": activations,
            "input_ids": RowContexts(contexts, rows.document_N, int(rows.position_N.max()) + 1),
            "position": torch.from_numpy(rows.position_N),
            "doc_id": torch.from_numpy(contexts.doc_id_K[rows.document_N]),
        }

    def moments(self, tokens: datasets.Dataset, rows: Rows) -> Moments:
        """Of the activations of some rows after block ``layer_l``, on every rank."""
        batches = ForwardBatches(self.config, Contexts(tokens, rows.source_K, self.config.activation_dumper.seq_len), rows)

        def read(number: int, _: bool) -> Moments:
            ids_BC, index = batches[number]
            return Moments.of(self.subject.residual(ids_BC.to(self.ranks.device))[index[1], index[2]].cpu())

        return reduce(add, self.ranks.divide(len(batches), read))
