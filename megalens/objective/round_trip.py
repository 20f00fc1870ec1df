"""Terms on the round trip through soft text: the rebuild's error, its functional KL, the text's language and its entropy."""

from __future__ import annotations

from torch import Tensor

from megalens.config import Config
from megalens.objective.base import Pass, Term
from megalens.objective.functions import next_token_kl, relative_mse, resample_error, token_mean
from megalens.objective.step import Step


class Mse(Term):
    """Relative squared error of the rebuild, ``|a - a_hat|^2 / |a|^2``."""

    name, key, needs, free = "mse", "mse_weight", frozenset({"text", "rebuild"}), True

    def __init__(self, config: Config):
        super().__init__(config)
        self.trains_text = config.text_gradient

    def __call__(self, made: Pass) -> Tensor:
        return relative_mse(made.activation_BD, made.a_hat_BD)


class Entropy(Term):
    """Entropy of the verbalizer's next-token distributions over the text, in nats, the end among its tokens: its weight is a bonus."""

    name, key, needs, free, trains_text = "entropy", "entropy_weight", frozenset({"text"}), True, True

    def weight(self, at: Step) -> float:
        """Minus its weight in the configuration: the loss falls as the entropy rises."""
        return -super().weight(at)

    def __call__(self, made: Pass) -> Tensor:
        return token_mean(made.text.entropy_BT, made.text.drawn_BT)


class FunctionalKl(Term):
    """KL(M(a) || M(a_hat + delta)) of the subject's next token, in nats; delta is the error of the row's partner."""

    name, key, needs = "kl", "kl_base_weight", frozenset({"read", "text", "rebuild"})

    def __init__(self, config: Config):
        super().__init__(config)
        self.trains_text = config.text_gradient

    def __call__(self, made: Pass) -> Tensor:
        a_hat_BD, subject = made.a_hat_BD, made.lens.subject
        read = made.read
        delta_BD = resample_error(made.activation_BD.to(a_hat_BD.dtype), a_hat_BD)
        return next_token_kl(subject.lm, read.normed_BD, subject.patched(read, a_hat_BD + delta_BD)).mean()


class LanguageKl(Term):
    """KL(verbalizer || subject on the plain prompt) over the text's tokens, in nats; the subject is a constant."""

    name, key, needs, trains_text = "lm", "lm_base_weight", frozenset({"text"}), True

    def weight(self, at: Step) -> float:
        """Its weight in the configuration, times ``alpha_schedule``."""
        return super().weight(at) * at.values["alpha_schedule"]

    def __call__(self, made: Pass) -> Tensor:
        text, subject = made.text, made.lens.subject
        plain_BTD = subject.next_states(made.lens.plain_ids, text.ids_BT)
        kl_N = next_token_kl(subject.lm, text.normed_BTD.flatten(0, 1), plain_BTD.flatten(0, 1))
        return token_mean(kl_N.view(text.ids_BT.shape), text.drawn_BT)
