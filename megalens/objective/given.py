"""Terms on given texts, teacher-forced: the context's tail as what the verbalizer shall say and the reconstructor shall read."""

from __future__ import annotations

from torch import Tensor

from megalens.objective.base import Pass, Term
from megalens.objective.functions import relative_mse


class TailSay(Term):
    """Cross-entropy of the verbalizer on the context's tail, per token, in nats."""

    name, key, needs = "tail_say", "tail_say_weight", frozenset({"tails"})

    def __call__(self, made: Pass) -> Tensor:
        return -made.lens.verbalizer.log_prob_of(made.activation_BD, made.tail_BT).mean()


class TailRead(Term):
    """Relative squared error of the reconstructor reading the context's tail."""

    name, key, needs = "tail_read", "tail_read_weight", frozenset({"tails"})

    def __call__(self, made: Pass) -> Tensor:
        embeds_BTD = made.lens.subject.lm.embed(made.tail_BT)
        return relative_mse(made.activation_BD, made.lens.reconstructor(embeds_BTD))
