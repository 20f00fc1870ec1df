"""Readers of texts beside the lens's own reconstructor. What they rebuild tells plain words from a code that only one reader knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalens.data.pretokenize import encode
from megalens.evaluate import EvaluationError
from megalens.evaluate.measure import Rebuild
from megalens.evaluate.text import is_text, pad, to_ids
from megalens.lens.lens import ConsistencyLens


@dataclass(frozen=True)
class Reader:
    """Rebuilds activations from a lens's explanations; ``name`` stands beside its figures."""

    name: str
    rebuild: Callable[[ConsistencyLens, list[str]], Rebuild]


def read_by_subject(lens: ConsistencyLens, texts: list[str]) -> Rebuild:
    """The untouched subject's residual at the last token of each string; a BOS comes first where its tokenizer puts one."""
    return _residual_at_end(lens, encode(lens.tokenizer, texts), texts)


def in_reading_order(lens: ConsistencyLens, texts: list[str]) -> list[list[int]]:
    """Token ids of a lens's explanations in the order in which its reconstructor reads them: as they stand in a context."""
    ids = to_ids(lens.tokenizer, texts)
    return [each[1:] + each[:1] for each in ids] if lens.reconstructor.first_is_last else ids


def _explanations_by_subject(lens: ConsistencyLens, texts: list[str]) -> Rebuild:
    start = encode(lens.tokenizer, [""])[0]
    return _residual_at_end(lens, [start + ids for ids in in_reading_order(lens, texts)], texts)


SUBJECT = Reader("the untouched subject", _explanations_by_subject)
"""The subject's own blocks up to the layer, without prompts or adapters: the residual at the last token that is read."""


def other_lens(other: ConsistencyLens, lens: ConsistencyLens, name: str) -> Reader:
    """The reconstructor of another lens.

    Raises:
        EvaluationError: it is of another subject or layer.
    """
    if (other.subject.fingerprint, other.config.layer_l) != (lens.subject.fingerprint, lens.config.layer_l):
        mine, theirs = (f"layer {each.config.layer_l} of {each.config.model_name}" for each in (lens, other))
        raise EvaluationError(f"evaluation.other_reader={name} reads {theirs}, the lens reads {mine}; name a lens of the same")

    def rebuild(lens: ConsistencyLens, texts: list[str]) -> Rebuild:
        ids = in_reading_order(lens, texts)
        if other.reconstructor.first_is_last:
            ids = [each[-1:] + each[:-1] for each in ids]
        a_hat_BD = other.reconstruct(*pad(ids))
        return Rebuild(a_hat_BD, torch.tensor([not is_text(text) for text in texts], device=a_hat_BD.device))

    return Reader(name, rebuild)


def _residual_at_end(lens: ConsistencyLens, ids: list[list[int]], texts: list[str]) -> Rebuild:
    ids_BT, lengths_B = pad(ids)
    failed_B = torch.tensor([not is_text(text) for text in texts]) | (lengths_B == 0)
    resid_BTD = lens.subject.residual(ids_BT.to(lens.mean.device))
    last_B = (lengths_B - 1).clamp_min(0).to(resid_BTD.device)
    a_hat_BD = resid_BTD[torch.arange(len(texts), device=resid_BTD.device), last_B].float()
    return Rebuild(a_hat_BD, failed_B.to(a_hat_BD.device))
