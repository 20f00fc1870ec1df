"""Terms on texts that are there already, teacher-forced: what the verbalizer shall say and the reconstructor shall read.

The context's own tail, which costs nothing, or texts of a file (:mod:`megalens.data.texts`).
"""

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


class Say(Term):
    """Cross-entropy of the verbalizer on a given text, its tags and its end, in nats: the mean over rows of each one's weighted mean."""

    name, needs = "say", frozenset({"given"})

    def __call__(self, made: Pass) -> Tensor:
        words_BW, lengths_B, weight_BW = made.given
        frame = made.lens.frame
        ids_BT, _ = frame.put(words_BW, lengths_B)
        log_prob_BT = made.lens.verbalizer.log_prob_of(made.activation_BD, ids_BT)
        return -token_mean(log_prob_BT, frame.counted(lengths_B, ids_BT.shape[1], weight_BW))


class Read(Term):
    """Relative squared error of the reconstructor reading a given text, without its tags."""

    name, needs = "read", frozenset({"given"})

    def __call__(self, made: Pass) -> Tensor:
        words_BW, lengths_B, _ = made.given
        return relative_mse(made.activation_BD, made.lens.reconstructor(made.lens.subject.lm.embed(words_BW), lengths_B))
