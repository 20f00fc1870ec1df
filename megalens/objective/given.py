"""Terms on given texts, teacher-forced: the context's tail as what the verbalizer shall say and the reconstructor shall read."""

from __future__ import annotations

from torch import Tensor

from megalens.lens.text import drawn
from megalens.objective.base import Pass, Term
from megalens.objective.functions import relative_mse, token_mean


class TailSay(Term):
    """Cross-entropy of the verbalizer on the context's tail, per token, in nats."""

    name, key, needs = "tail_say", "tail_say_weight", frozenset({"tails"})

    def __call__(self, made: Pass) -> Tensor:
        ids_BT, lengths_B = made.lens.frame.put(*made.tails)
        log_prob_BT = made.lens.verbalizer.log_prob_of(made.activation_BD, ids_BT)
        return -token_mean(log_prob_BT, None if lengths_B is None else drawn(lengths_B, ids_BT.shape[1]))


class TailRead(Term):
    """Relative squared error of the reconstructor reading the context's tail."""

    name, key, needs = "tail_read", "tail_read_weight", frozenset({"tails"})

    def __call__(self, made: Pass) -> Tensor:
        ids_BW, lengths_B = made.tails
        return relative_mse(made.activation_BD, made.lens.reconstructor(made.lens.subject.lm.embed(ids_BW), lengths_B))
