"""The policy's gradient on sampled texts: GRPO and its relatives.

A text's advantage is its reward above that of the other texts of its activation. Whatever was sampled counts, unfinished texts too: what
is left out of the mean would be learnt from by nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalens.config import Config
from megalens.objective.base import Pass, Term


class Policy(Term):
    """Minus the clipped gain of each token, times its text's advantage, minus the bonus for entropy."""

    name, needs = "policy", frozenset({"rollouts"})

    def __init__(self, config: Config):
        super().__init__(config)
        self.draws = config.rollouts.draws
        self.needs = needs_of_reward(config)

    def __call__(self, made: Pass) -> Tensor:
        return self.rows(made).mean()

    def rows(self, made: Pass) -> Tensor:
        """Its value for each activation ``[B]``."""
        settings, r, said = self.config.policy, made.rollouts, made.said
        reward_BK, entropy = made.judged.reward_BK, made.at.values["policy.entropy"]
        advantage_BK1 = advantages(reward_BK, settings.baseline, settings.by_deviation)[..., None]
        strictly = self.config.rollouts.inner_steps == 1
        old_BKT = said.log_prob.detach() if strictly else r.log_prob_BKT
        value_BKT = -clipped_gain(said.log_prob, old_BKT, advantage_BK1, settings.clip) - entropy * said.entropy
        tokens = {"t_text": r.ids_BKT.shape[2], "tokens": r.tokens_per_text or r.ids_BKT.shape[2]}.get(settings.mean_over)
        with torch.no_grad():
            made.figures["rollout_entropy"] = mean_of_tokens(said.entropy, r.said_BKT, None).mean()
            drift_BKT = (said.log_prob - r.log_prob_BKT).abs()
            made.figures["rollout_drift"] = mean_of_tokens(drift_BKT, r.said_BKT, None).mean()
        return mean_of_tokens(value_BKT, r.said_BKT, tokens).mean(1)


def needs_of_reward(config: Config) -> frozenset[str]:
    """What a term that asks for rewards needs of a pass."""
    return frozenset({"rollouts", "read"} if config.reward.kl else {"rollouts"})


def advantages(reward_BK: Tensor, baseline: str = "mean", by_deviation: bool = False) -> Tensor:
    """Rewards above those of the same activation's texts, ``[B, K]``; exactly 0 where all are worth the same.

    Args:
        baseline: ``mean``: of all K; its expected gradient is (K - 1) / K of the true one. ``leave_one_out``: of the other K - 1; exact.
        by_deviation: divide by the standard deviation + 1e-4 (Shao et al., DeepSeekMath, 2024).
    """
    draws = reward_BK.shape[1]
    centred_BK = reward_BK - reward_BK.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        centred_BK = centred_BK * (draws / (draws - 1))
    if by_deviation:
        centred_BK = centred_BK / (reward_BK.std(1, correction=0, keepdim=True) + 1e-4)
    same_B1 = reward_BK.amax(1, keepdim=True) == reward_BK.amin(1, keepdim=True)  # whose mean may be off by rounding
    return centred_BK.masked_fill(same_B1, 0.0)


def clipped_gain(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)`` of each token (Schulman et al., Proximal policy optimization, 2017).

    With ``old`` the detached ``log_prob`` itself the ratio is 1, and the gradient that of ``A * log_prob``.
    """
    ratio = (log_prob - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def mean_of_tokens(value_BKT: Tensor, said_BKT: Tensor, tokens: float | None) -> Tensor:
    """What each text adds to a mean, ``[B, K]``: the sum over its tokens, by their number or by ``tokens``."""
    total_BK = value_BKT.masked_fill(~said_BKT, 0.0).sum(2)
    return total_BK / (said_BKT.sum(2) if tokens is None else tokens)
