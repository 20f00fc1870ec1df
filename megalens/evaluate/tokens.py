"""What a lens says of every token of a text, and how well what it says can be rebuilt from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalens.evaluate.measure import Search, read_by_lens
from megalens.evaluate.metrics import row_fve, row_statistics
from megalens.evaluate.text import pieces
from megalens.lens.lens import ConsistencyLens
from megalens.statistics import ActivationStatistics


@dataclass(frozen=True)
class TokenExplanation:
    """One token of a text and what the lens reads in the activation there.

    Args:
        token: the token's text; empty where it ends inside a character (the token that completes the character holds it).
        explanation: what the lens says.
        fve: ``1 - |u - u_hat|^2 / |u - m|^2`` (:func:`megalens.evaluate.metrics.row_fve`): 1 is a perfect rebuild of the activation's
            direction from the explanation alone, 0 is no better than the training mean, below 0 is worse than it.
        search: how the explanation was chosen, e.g. ``greedy``.
        reads: texts that the reconstructor read to choose it.
    """

    token: str
    explanation: str
    fve: float
    search: str
    reads: int = 0


@torch.no_grad()
def explain_ids(
    lens: ConsistencyLens,
    ids: list[int],
    statistics: ActivationStatistics,
    search: Search,
    batch_size: int = 64,
    positions: list[int] | None = None,
) -> list[TokenExplanation]:
    """Explain positions of a token sequence in the order given; None: all, the first ones (attention sinks, which no lens was trained on)
    included. Ranks that use the lens together divide them."""
    resid_CD = lens.subject.residual(torch.tensor([ids], device=lens.mean.device))[0].float()
    chosen = torch.tensor(range(len(ids)) if positions is None else positions, dtype=torch.long, device=resid_CD.device)
    tokens = pieces(lens.tokenizer, ids)

    def explained(position_B: Tensor) -> list[TokenExplanation]:
        a_BD = resid_CD[position_B]
        said = search(lens, a_BD, position_B)
        rebuild = read_by_lens(lens, said.texts)
        fve = row_fve(row_statistics(a_BD, rebuild.a_hat_BD, statistics, rebuild.failed_B)).tolist()
        reads = [cost.reads for cost in said.costs] or [0] * len(said.texts)
        found = zip(position_B.tolist(), said.texts, fve, reads, strict=True)
        return [TokenExplanation(tokens[at], text, value, search.name, count) for at, text, value, count in found]

    return [each for part in lens.ranks.divide_batches(chosen.split(batch_size), explained) for each in part]
