"""Floors and ceilings: what the same rows score with something else in the explanation's place.

A new one is a function here under :func:`source`; measuring, tables and the page take it from :data:`SOURCES`.
Copied texts too are re-tokenised from their string.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megalens.batch import Batch
from megalens.evaluate.measure import Rebuild, read_by_lens
from megalens.evaluate.readers import read_by_subject
from megalens.evaluate.text import to_texts
from megalens.evaluate.token_means import TokenMeans
from megalens.lens.lens import ConsistencyLens


@dataclass
class Given:
    """What a source may rebuild from.

    Args:
        lens: with its subject.
        batch: the rows, on the lens's device.
        texts: the lens's explanations of them.
        other_texts: explanations of other rows (:func:`partners`).
        count_B: tokens of each copy: as many as the text in whose place it stands.
        mean_D: the mean of the TRAINING activations.
        token_means: of the training activations, by the token at P; None: they are gone, and what is made of them is left out.
    """

    lens: ConsistencyLens
    batch: Batch
    texts: list[str]
    other_texts: list[str]
    count_B: Tensor
    mean_D: Tensor
    token_means: TokenMeans | None = None


class Source(NamedTuple):
    """Something that rebuilds rows; ``label`` is its name in tables."""

    label: str
    rebuild: Callable[[Given], Rebuild]


SOURCES: dict[str, Source] = {}
"""Every source of a rebuild by name: ceilings, the lens, floors. Tables show them in this order."""


def source(name: str, label: str) -> Callable[[Callable[[Given], Rebuild]], Callable[[Given], Rebuild]]:
    """Register the function below it as a source."""

    def register(rebuild: Callable[[Given], Rebuild]) -> Callable[[Given], Rebuild]:
        SOURCES[name] = Source(label, rebuild)
        return rebuild

    return register


@source("gold", "gold activation patched back")
def _gold(given: Given) -> Rebuild:
    return _without_text(given.batch["activation"])


@source("copy_subject", "copy, untouched subject")
def _copy_subject(given: Given) -> Rebuild:
    """As many of the context's last tokens (fewer where it is shorter) through the subject's own blocks, without prompts or adapters."""
    tokenizer, batch = given.lens.tokenizer, given.batch
    return read_by_subject(given.lens, context_tails(tokenizer, batch["input_ids"], batch["position"], given.count_B))


@source("copy", "copy, same reconstructor")
def _copy(given: Given) -> Rebuild:
    """The same tokens in the lens's ``tail_order``, so that its reconstructor reads them as they stood."""
    return read_by_lens(given.lens, to_texts(given.lens.tokenizer, *given.lens.tails(given.batch, given.count_B)))


@source("lens", "LENS")
def _lens(given: Given) -> Rebuild:
    return read_by_lens(given.lens, given.texts)


@source("token_mean", "mean of the token at P")
def _token_mean(given: Given) -> Rebuild:
    """What reading the last token alone, and nothing else, could give."""
    if given.token_means is None:
        raise ValueError("there are no means of tokens; see sources_of")
    return _without_text(given.token_means.rebuild(given.batch["input_ids"], given.batch["position"]))


@source("shuffled", "explanations of other rows")
def _shuffled(given: Given) -> Rebuild:
    return read_by_lens(given.lens, given.other_texts)


@source("empty", "empty text")
def _empty(given: Given) -> Rebuild:
    return _without_text(read_by_lens(given.lens, [""] * len(given.texts)).a_hat_BD)


@source("mean", "mean activation")
def _mean(given: Given) -> Rebuild:
    return _without_text(given.mean_D.expand_as(given.batch["activation"]))


def context_tails(tokenizer: PreTrainedTokenizerBase, input_ids_BC: Tensor, position_B: Tensor, count_B: Tensor) -> list[str]:
    """The last ``count_B`` tokens of each context up to P, as text."""
    places = zip(input_ids_BC.tolist(), position_B.tolist(), count_B.tolist(), strict=True)
    contexts = [row[max(0, p + 1 - count) : p + 1] for row, p, count in places]
    return tokenizer.batch_decode(contexts, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def sources_of(token_means: TokenMeans | None) -> tuple[str, ...]:
    """The sources that can be measured."""
    return tuple(name for name in SOURCES if name != "token_mean" or token_means is not None)


def partners(doc_ids: np.ndarray) -> np.ndarray:
    """For each row the number of a row of another document; each row serves once ``[N]``.

    Rows are sorted by document and shifted by half their number. No row meets its own document unless one holds more than half of all.
    """
    order = np.argsort(doc_ids, kind="stable")
    result = np.empty_like(order)
    result[order] = np.roll(order, len(order) // 2)
    return result


def _without_text(a_hat_BD: Tensor) -> Rebuild:
    """Rebuilds that no text was needed for, so that none has failed."""
    return Rebuild(a_hat_BD.float(), torch.zeros(len(a_hat_BD), dtype=torch.bool, device=a_hat_BD.device))
