"""Supervised terms on sampled texts: the verbalizer says the best of them again, the reconstructor reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from megalens.config import Config
from megalens.objective.base import Pass, Term
from megalens.objective.policy import mean_of_tokens, needs_of_reward


class Imitate(Term):
    """Cross-entropy on the best of an activation's texts, or on all of them weighted by softmax of their reward, per token, in nats.

    A text that failed is never imitated.
    """

    name, needs = "imitate", frozenset({"rollouts"})

    def __init__(self, config: Config):
        super().__init__(config)
        self.draws = config.rollouts.draws
        self.needs = needs_of_reward(config)

    def __call__(self, made: Pass) -> Tensor:
        settings, r, judged = self.config.rollouts, made.rollouts, made.judged
        reward_BK = judged.reward_BK.masked_fill(judged.failed_BK, -torch.inf)
        if settings.imitate == "weighted":
            weight_BK = (reward_BK / settings.imitate_temperature).softmax(1).nan_to_num(0.0)  # 0 where all failed
            cost_BK = mean_of_tokens(-made.log_prob_BKT, r.said_BKT, None)
            return (weight_BK * cost_BK).sum(1).mean()
        best_B11 = reward_BK.argmax(1)[:, None, None]
        ids_BT, said_BT = (x.gather(1, best_B11.expand(-1, 1, x.shape[2]))[:, 0] for x in (r.ids_BKT, r.said_BKT))
        cost_B = mean_of_tokens(-made.lens.verbalizer.log_prob_of(made.activation_BD, ids_BT)[:, None], said_BT[:, None], None)[:, 0]
        return cost_B.masked_fill(judged.failed_BK.all(1), 0.0).mean()


class RolloutRead(Term):
    """Error of the reconstructor that reads sampled texts, as ``rollouts.read_loss`` says; a text that failed counts as 0."""

    name, needs, reads_rollouts = "rollout_read", frozenset({"rollouts"}), True

    def __init__(self, config: Config):
        super().__init__(config)
        self.draws = config.rollouts.draws
        self.needs = needs_of_reward(config)

    def __call__(self, made: Pass) -> Tensor:
        judged, settings = made.judged, self.config.rollouts
        anchored_BK = judged.direction_BK + settings.norm_anchor * judged.log_norm_BK.square()
        loss_BK = judged.mse_BK if settings.read_loss == "mse" else anchored_BK
        return loss_BK.masked_fill(judged.failed_BK, 0.0)[:, : judged.read].mean()
