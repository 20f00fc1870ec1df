"""What a text is worth for an activation, how two activations differ, and what the subject does with a text in an activation's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalens.evaluate.measure import read_by_lens, said
from megalens.evaluate.metrics import logit_statistics, normalised_error, row_fve, row_statistics
from megalens.evaluate.trust.words import content_words
from megalens.lens.lens import ConsistencyLens
from megalens.statistics import ActivationStatistics

SHOWN = 5  # likeliest next tokens


@dataclass(frozen=True)
class Score:
    """What the reconstructor makes of a text, held against an activation.

    Args:
        fve: ``1 - |u - u_hat|^2 / |u - m|^2`` of the unit-length vectors; 1 is perfect, 0 no better than the training mean.
        cos: cosine between activation and rebuild.
        mse: ``2 (1 - cos)``, between 0 and 4.
        failed: the text says nothing, or its rebuild is not finite: it was scored as the mean activation.
    """

    fve: float
    cos: float
    mse: float
    failed: bool


@dataclass(frozen=True)
class Patched:
    """What the subject does when a rebuilt activation takes the place of its own at one token.

    Args:
        kl: KL divergence, in nats, of its next-token distribution at that token from the untouched one.
        before, after: its likeliest next tokens there with their probabilities, untouched and patched.
        plain, patched: its greedy continuation of the whole text, untouched and patched.
        score: of the text that was patched in, against the activation whose place it takes; None where no text was.
    """

    kl: float
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    plain: str
    patched: str
    score: Score | None = None


@dataclass(frozen=True)
class Comparison:
    """What the lens says of two activations.

    Args:
        cos: cosine between them.
        texts: a greedy text of each.
        fve: ``[2][2]``: of the first activation by both texts, then of the second.
        only: words that at least half the samples of one say, and at most one of the other's, for each.
        difference: what the lens says of ``a - b`` around the training mean, at the norm of ``a``; no lens was trained on differences.
    """

    cos: float
    texts: tuple[str, str]
    fve: list[list[float]]
    only: tuple[list[str], list[str]]
    difference: str


@torch.no_grad()
def score_texts(lens: ConsistencyLens, statistics: ActivationStatistics, texts: Sequence[str], a_ND: Tensor, size: int = 64) -> list[Score]:
    """Score texts against activations ``[N, D]``, one each."""
    scores = []
    for start in range(0, len(texts), size):
        rebuild, a_BD = read_by_lens(lens, list(texts[start : start + size])), a_ND[start : start + size].float()
        rows = row_statistics(a_BD, rebuild.a_hat_BD, statistics, rebuild.failed_B)
        columns = row_fve(rows), rows["cos"], 2 * (1 - rows["cos"]), rows["failed"] > 0
        scores += [Score(float(f), float(c), float(m), bool(b)) for f, c, m, b in zip(*columns, strict=True)]
    return scores


@torch.no_grad()
def patch(lens: ConsistencyLens, ids: list[int], position: int, a_D: Tensor, tokens: int = 20) -> Patched:
    """Put an activation ``[D]`` in the place of the subject's own at a token of a text, and let the subject go on.

    Args:
        ids: the text's token ids.
        position: of the token, from 0.
        tokens: of the continuation behind the text's end.
    """
    subject, device = lens.subject, lens.mean.device
    ids_1C, position_1 = torch.tensor([ids], device=device), torch.tensor([position], device=device)
    a_1D = a_D.to(device).float()[None]
    read = subject.read(ids_1C, position_1)
    true_1V, patched_1V = subject.lm.logits(read.normed_BD), subject.patched_logits(read, a_1D)

    def replace(hidden_1SD: Tensor, positions_S: Tensor) -> Tensor:
        return torch.where((positions_S == position)[None, :, None], a_1D[:, None].to(hidden_1SD.dtype), hidden_1SD)

    continued = [subject.go_on(ids_1C, tokens, edit) for edit in (None, replace)] if tokens else [ids_1C[:, :0]] * 2
    plain, patched = (str(lens.tokenizer.decode(each[0].tolist(), skip_special_tokens=True)) for each in continued)
    kl = float(logit_statistics(true_1V, patched_1V)["kl"][0])
    return Patched(kl, _likeliest(lens, true_1V), _likeliest(lens, patched_1V), plain, patched)


@torch.no_grad()
def compare(lens: ConsistencyLens, statistics: ActivationStatistics, a_D: Tensor, b_D: Tensor, draws: int = 8) -> Comparison:
    """What the lens says of one activation and not of the other."""
    pair_2D = torch.stack([a_D, b_D]).float().to(lens.mean.device)
    mean_D = statistics.mean.to(pair_2D)
    apart_D = pair_2D[0] - pair_2D[1]
    apart_D = mean_D + apart_D * pair_2D[0].norm() / apart_D.norm().clamp_min(1e-12)
    first, second, difference = said(lens, lens.verbalize(torch.stack([*pair_2D, apart_D]))).texts
    error = [normalised_error(pair_2D, read_by_lens(lens, [text] * 2).a_hat_BD) for text in (first, second)]
    unit_2D = torch.nn.functional.normalize(pair_2D, dim=-1)
    spread_2 = np.square((unit_2D - statistics.mean_normalised.to(unit_2D)).double().cpu().numpy()).sum(-1)
    fve = [[float(1 - each[row] / spread_2[row]) for each in error] for row in range(2)]
    ids_2KT = lens.rollout(pair_2D, torch.arange(2, device=pair_2D.device), 0, draws).ids_BKT
    counts = [[content_words(text) for text in said(lens, ids_KT).texts] for ids_KT in ids_2KT]
    only = tuple(_only(counts[row], counts[1 - row]) for row in range(2))
    return Comparison(float((unit_2D[0] * unit_2D[1]).sum()), (first, second), fve, (only[0], only[1]), difference)


def _only(own: list[frozenset[str]], other: list[frozenset[str]]) -> list[str]:
    words = sorted(frozenset().union(*own))
    return [w for w in words if 2 * sum(w in text for text in own) >= len(own) and sum(w in text for text in other) <= 1]


def _likeliest(lens: ConsistencyLens, logits_1V: Tensor) -> list[tuple[str, float]]:
    value, index = logits_1V[0].float().softmax(-1).topk(SHOWN)
    return [(str(lens.tokenizer.decode([i])), p) for i, p in zip(index.tolist(), value.tolist(), strict=True)]
