"""What a lens says of every token of a text, and how well what it says can be rebuilt from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalens.evaluate.baselines import read_by_lens
from megalens.evaluate.metrics import Reference, row_fve, row_statistics
from megalens.evaluate.text import pieces, to_texts
from megalens.lens.lens import ConsistencyLens


@dataclass(frozen=True)
class TokenExplanation:
    """One token of a text and what the lens reads in the activation there.

    Args:
        token: the token's text; empty where it ends inside a character (the token that completes the character holds it).
        explanation: what the lens says.
        fve: ``1 - |u - u_hat|^2 / |u - m|^2`` (:func:`megalens.evaluate.metrics.row_fve`): 1 is a perfect rebuild of the activation's
            direction from the explanation alone, 0 is no better than the training mean, below 0 is worse than it.
    """

    token: str
    explanation: str
    fve: float


@torch.no_grad()
def explain_ids(lens: ConsistencyLens, ids: list[int], reference: Reference, batch_size: int = 64) -> list[TokenExplanation]:
    """Explain every position of a token sequence, the first ones (attention sinks, which no lens was trained on) included."""
    resid_CD = lens.subject.residual(torch.tensor([ids], device=lens.mean.device))[0].float()
    texts, fve = [], []
    for a_BD in resid_CD.split(batch_size):
        said = to_texts(lens.tokenizer, lens.verbalize(a_BD))
        rebuilt = read_by_lens(lens, said)
        fve += row_fve(row_statistics(a_BD, rebuilt.a_hat_BD, reference, rebuilt.failed_B)).tolist()
        texts += said
    return [TokenExplanation(*each) for each in zip(pieces(lens.tokenizer, ids), texts, fve, strict=True)]
