"""What sampled texts are worth: how well the reconstructor rebuilds their activation from them, and what else a text shall be.

The reconstructor reads the very tokens that were sampled. A reader of the string may see others: where a text is tokenised again to
different tokens, training scores what evaluation does not. :func:`megalens.evaluate.text.round_trips` tells for which texts that is so;
their share is in every report of ``megalens eval``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megalens.lens.text import prefix_lengths
from megalens.objective.functions import next_token_kl
from megalens.ops import vocab_log_prob

if TYPE_CHECKING:
    from megalens.objective.base import Pass


@dataclass(frozen=True)
class Judged:
    """What came of a micro-batch's rollouts, ``[B, K]`` each. Errors have gradients of the reconstructor for the first ``read`` draws.

    Args:
        reward_BK: without gradient; the floor where a text failed.
        failed_BK: texts that are unfinished, say nothing, or have no finite rebuild.
        direction_BK: ``2 - 2 cos``.
        mse_BK: ``|a - a_hat|^2 / |a|^2``.
        log_norm_BK: log of ``|a_hat| / |a|``.
        read: draws whose errors have gradients.
    """

    reward_BK: Tensor
    failed_BK: Tensor
    direction_BK: Tensor
    mse_BK: Tensor
    log_norm_BK: Tensor
    read: int


def judge(made: Pass, learns: bool) -> Judged:
    """Rebuild every text's activation, once for all terms, and add up its reward.

    Args:
        learns: the reconstructor, from ``rollouts.read_share`` of each activation's texts.
    """
    r, lens = made.rollouts, made.lens
    read = math.ceil(made.config.rollouts.read_share * r.ids_BKT.shape[1]) if learns else 0
    draws, ids_NT, lengths_N = r.ids_BKT.shape[1], r.ids_BKT.flatten(0, 1), r.lengths_BK.flatten()
    explained = lens.frame.explained(ids_NT, lengths_N if r.ends else None)
    words_NT, count_N = explained.of(ids_NT), lengths_N if explained.lengths_B is None else explained.lengths_B
    failed_N = ~r.finished_BK.flatten() | lens.frame.says_nothing(words_NT, count_N)
    if explained.failed_B is not None:
        failed_N = failed_N | explained.failed_B
    shortest = made.config.verbalizer.shortest_prefix
    if shortest is not None:
        least = prefix_lengths(made.config.seed, made.at.update, made.batch["sample_id"], shortest, ids_NT.shape[1])
        count_N = torch.minimum(count_N, least.repeat_interleave(draws))
    a_hat_BKD = _rebuilt(made, words_NT.view(r.ids_BKT.shape), count_N.view(r.lengths_BK.shape), read)
    a_B1D = made.activation_BD.to(a_hat_BKD.dtype)[:, None]
    direction_BK, mse_BK, log_norm_BK = errors(a_B1D, a_hat_BKD)
    with torch.no_grad():
        reward_BK, weight = torch.zeros_like(mse_BK), _weights(made)
        for name, worth in {"direction": -direction_BK, "mse": -mse_BK, "log_mse": -mse_BK.clamp_min(1e-8).log()}.items():
            reward_BK = reward_BK + weight[name] * worth if weight[name] else reward_BK
        if weight["kl"]:
            reward_BK = reward_BK - weight["kl"] * _functional_kl(made, a_hat_BKD)
        if weight["language"]:
            reward_BK = reward_BK + weight["language"] * _language(made, words_NT, count_N).view(reward_BK.shape)
        reward_BK = reward_BK - weight["price"] * r.lengths_BK
        failed_BK = failed_N.view(reward_BK.shape) | ~reward_BK.isfinite()
        reward_BK = reward_BK.masked_fill(failed_BK, made.config.rollouts.floor)
    made.figures["rollout_reward"] = reward_BK.mean()
    made.figures["rollout_spread"] = reward_BK.std(1, correction=0).mean()
    return Judged(reward_BK, failed_BK, direction_BK, mse_BK, log_norm_BK, read)


def errors(a_D: Tensor, a_hat_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``2 - 2 cos``, the relative squared error and the log of the norms' ratio, over the last dimension.

    Their gradients are finite everywhere, also at a rebuild of zero.
    """
    square, square_hat = a_D.square().sum(-1) + 1e-12, a_hat_D.square().sum(-1) + 1e-12
    cos = (a_D * a_hat_D).sum(-1) * square.rsqrt() * square_hat.rsqrt()
    return 2 - 2 * cos, (a_D - a_hat_D).square().sum(-1) / square, 0.5 * (square_hat.log() - square.log())


def _weights(made: Pass) -> dict[str, float]:
    return {key.removeprefix("reward."): value for key, value in made.at.values.items() if key.startswith("reward.")}


def _rebuilt(made: Pass, ids_BKT: Tensor, count_BK: Tensor, read: int) -> Tensor:
    """``[B, K, D]``, with gradient for the first ``read`` draws."""
    parts = []
    for draws, learns in ((slice(0, read), True), (slice(read, ids_BKT.shape[1]), False)):
        ids_NT, count_N = ids_BKT[:, draws].flatten(0, 1), count_BK[:, draws].flatten()
        if len(ids_NT):
            with nullcontext() if learns else torch.no_grad():
                a_hat_ND = made.lens.reconstructor(made.lens.subject.lm.embed(ids_NT), count_N)
            parts.append(a_hat_ND.view(len(ids_BKT), -1, a_hat_ND.shape[-1]))
    return torch.cat(parts, dim=1)


def _functional_kl(made: Pass, a_hat_BKD: Tensor) -> Tensor:
    """KL(M(a) || M(a_hat)) of the subject's next token, ``[B, K]``, in nats."""
    subject, draws = made.lens.subject, a_hat_BKD.shape[1]
    read = replace(made.read, prefix=made.read.prefix.repeated(draws))
    patched_ND = subject.patched(read, a_hat_BKD.flatten(0, 1))
    kl_N = next_token_kl(subject.lm, made.read.normed_BD.repeat_interleave(draws, 0), patched_ND)
    return kl_N.view(a_hat_BKD.shape[:2])


def _language(made: Pass, ids_NT: Tensor, count_N: Tensor) -> Tensor:
    """Log-probability of each text under the subject on the plain prompt, per token of it ``[N]``."""
    lm, states_NTD = made.lens.subject.lm, made.lens.subject.next_states(made.lens.plain_ids, ids_NT)
    log_prob_M = lm.vocabulary(
        lambda out, _, bias: vocab_log_prob(states_NTD.flatten(0, 1), out, ids_NT.flatten(), bias_V=bias, softcap=lm.softcap).log_prob
    )
    counted_NT = torch.arange(ids_NT.shape[1], device=ids_NT.device) < count_N[:, None]
    return (log_prob_M.view(ids_NT.shape) * counted_NT).sum(1) / count_N.clamp_min(1)
