"""From explanations to what they score, row by row. Validation, the choice of the best checkpoint, evaluation and page all measure here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megalens.batch import Batch
from megalens.evaluate.metrics import logit_statistics, mean_where_failed, row_statistics
from megalens.evaluate.text import is_text, pad, round_trips, to_ids, to_texts
from megalens.lens.lens import ConsistencyLens
from megalens.ops import vocab_log_prob
from megalens.statistics import ActivationStatistics


class Cost(NamedTuple):
    """What choosing the explanation of one activation took.

    Args:
        reads: texts that the reconstructor read, each once.
        said: tokens that the verbalizer decoded, or scored as it would have.
        priced: texts that the untouched subject read, to put a price on their language.
    """

    reads: int = 0
    said: int = 0
    priced: int = 0


@dataclass
class Said:
    """Explanations of some activations.

    Args:
        texts: as strings.
        round_trips: is each re-tokenised to the very tokens that were said?
        unfinished: is each without its end? Empty where texts cannot be.
        costs: what each took; empty where nothing was counted.
    """

    texts: list[str]
    round_trips: list[bool]
    unfinished: list[bool] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    def first(self, count: int) -> Said:
        """Those of the first activations."""
        return Said(self.texts[:count], self.round_trips[:count], self.unfinished[:count], self.costs[:count])

    def rows(self, numbers: np.ndarray, lens: ConsistencyLens) -> dict[str, np.ndarray]:
        """Row statistics of texts that end where they like: their tokens, and whether they are unfinished; none of others."""
        if lens.frame.end_id is None:
            return {}
        tokens = [len(ids) for ids in to_ids(lens.tokenizer, [self.texts[i] for i in numbers])]
        return {"tokens": np.array(tokens, float), "unfinished": np.array([self.unfinished[i] for i in numbers], float)}


class Search(Protocol):
    """A way to choose explanations; ``name`` stands beside every figure of them."""

    @property
    def name(self) -> str:
        """For example ``greedy``."""
        ...

    def __call__(self, lens: ConsistencyLens, a_BD: Tensor, row_B: Tensor) -> Said:
        """Explain activations ``[B, D]``; ``row_B`` (int64) numbers the rows for the noise."""
        ...


@dataclass
class Rebuild:
    """Rebuilt activations ``[B, D]`` (float32) and the rows that failed because their text says nothing ``[B]``."""

    a_hat_BD: Tensor
    failed_B: Tensor


def said(lens: ConsistencyLens, ids_BT: Tensor) -> Said:
    """The explanations in said texts ``[B, T]``, as strings; empty where a text should have tags and has failed."""
    frame = lens.frame
    lengths_B = frame.lengths(ids_BT)
    texts = to_texts(lens.tokenizer, ids_BT, lengths_B)
    if lengths_B is None:
        return Said(texts, round_trips(lens.tokenizer, ids_BT, texts), [False] * len(texts))
    unfinished = (lengths_B == ids_BT.shape[1]).tolist()
    texts = ["" if cut and frame.tag else frame.explanation(text) for text, cut in zip(texts, unfinished, strict=True)]
    explained = frame.explained(ids_BT, lengths_B)
    return Said(texts, round_trips(lens.tokenizer, explained.of(ids_BT), texts, explained.lengths_B), unfinished)


def read_by_lens(lens: ConsistencyLens, texts: list[str]) -> Rebuild:
    """What the reconstructor makes of strings."""
    a_hat_BD = lens.reconstruct(*pad(to_ids(lens.tokenizer, texts)))
    return Rebuild(a_hat_BD, torch.tensor([not is_text(text) for text in texts], device=a_hat_BD.device))


def nats_per_token(lens: ConsistencyLens, ids: list[list[int]]) -> np.ndarray:
    """How unlikely the untouched subject finds each text behind its plain prompt: mean of ``-log p`` over its tokens, in nats ``[N]``.

    ``exp`` of it is the text's perplexity. A text without tokens is infinitely unlikely.

    Args:
        ids: token ids of the texts, in the order in which they are said.
    """
    ids_BT, lengths_B = (x.to(lens.mean.device) for x in pad([*ids, [0, 0]]))  # two tokens at least: as many calls for any texts
    lm = lens.subject.lm
    normed_ND = lens.subject.next_states(lens.plain_ids, ids_BT).flatten(0, 1)
    log_prob_N = lm.vocabulary(
        lambda out, _, bias: vocab_log_prob(normed_ND, out, ids_BT.flatten(), bias_V=bias, softcap=lm.softcap).log_prob
    )
    said_BT = torch.arange(ids_BT.shape[1], device=lengths_B.device) < lengths_B[:, None]
    total_B = -(log_prob_N.view(ids_BT.shape).double() * said_BT).sum(1)
    return torch.where(lengths_B > 0, total_B / lengths_B, torch.inf).cpu().numpy()[: len(ids)]


class RowScorer:
    """Scores any rebuild of one batch; its contexts are read once.

    How often the lens is called does not depend on the rows or their texts, so ranks that share its weights can score different rows.

    Args:
        lens: with its subject.
        batch: rows on the lens's device.
        statistics: of the TRAINING activations.
    """

    def __init__(self, lens: ConsistencyLens, batch: Batch, statistics: ActivationStatistics):
        self.subject, self.statistics, self.a_BD = lens.subject, statistics, batch["activation"]
        self._mean_D = statistics.mean.to(self.a_BD)
        self._read = lens.read(batch)
        self._true_BV = self.subject.lm.logits(self._read.normed_BD)
        self._kl_mean_B = self._logits(self._mean_D.expand_as(self.a_BD))["kl"]

    def __call__(self, rebuild: Rebuild) -> dict[str, np.ndarray]:
        """All row statistics of :mod:`megalens.evaluate.metrics`, float64 ``[B]`` each; a failed row scores as the mean activation."""
        a_hat_BD, failed_B = mean_where_failed(rebuild.a_hat_BD, self._mean_D, rebuild.failed_B)
        rows = row_statistics(self.a_BD, a_hat_BD, self.statistics, failed_B)
        return rows | self._logits(a_hat_BD) | {"kl_mean": self._kl_mean_B}

    def _logits(self, a_hat_BD: Tensor) -> dict[str, np.ndarray]:
        return logit_statistics(self._true_BV, self.subject.patched_logits(self._read, a_hat_BD))
