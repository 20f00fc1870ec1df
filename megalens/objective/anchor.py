"""What holds the verbalizer near what it was when the training began, on texts that it samples."""

from __future__ import annotations

from torch import Tensor

from megalens.config import Config
from megalens.lens.sampling import Law
from megalens.objective.base import Pass, Term


class ReferenceKl(Term):
    """KL between the verbalizer and the reference per token, in nats, estimated from rollouts; the reference is a constant.

    Both at the temperature that the rollouts were sampled at. What ``rollouts.top_p`` cuts off is not left out of them: the estimate is of
    the whole distributions, from tokens of the nucleus.
    """

    name, needs = "reference_kl", frozenset({"rollouts", "reference"})

    def __init__(self, config: Config):
        super().__init__(config)
        self.draws = config.rollouts.draws

    def __call__(self, made: Pass) -> Tensor:
        rollouts, settings, law = made.rollouts, made.config.reference, Law(made.rollouts.law.temperature)
        a_BD, ids_NT = made.activation_BD, rollouts.ids_BKT.flatten(0, 1)
        shared = rollouts.law == law  # with the policy
        said_NT = made.said.log_prob.flatten(0, 1) if shared else made.lens.verbalizer.score(a_BD, ids_NT, law).log_prob
        kl_NT = sampled_kl(said_NT, made.lens.reference_log_prob(a_BD, ids_NT, law), settings.estimator, settings.clamp)
        return mean_of_texts(kl_NT, rollouts.said_BKT.flatten(0, 1))


def sampled_kl(log_prob: Tensor, reference: Tensor, estimator: str, clamp: float) -> Tensor:
    """A KL per sampled token whose gradient, over tokens that the policy itself samples, is that of an exact KL.

    With ``d = log_prob - reference``: k2 is ``d^2 / 2``, its expected gradient is exactly that of KL(policy || reference).
    k3 is ``exp(-d) - 1 + d``: its expected value is KL(policy || reference), its expected gradient that of KL(reference || policy); the two
    gradients differ in the second order of d. k1, ``d`` itself, has an expected gradient of zero. Of a text of several tokens it is the
    gradient of each token's KL with the tokens before it held fixed. (Schulman, Approximating KL divergence, 2020.)

    Args:
        log_prob, reference: in nats, of the same shape; the reference is a constant.
        estimator: ``k2`` or ``k3``.
        clamp: k3 goes on as a straight line where ``-d`` is greater, so that one unlikely token does not outweigh all others; it never
            stops pulling back.
    """
    d = log_prob - reference.detach()
    if estimator == "k2":
        return 0.5 * d.square()
    most = (-d).clamp_max(clamp)
    return most.exp() * (1.0 - d - most) - 1.0 + d


def mean_of_texts(values_NT: Tensor, said_NT: Tensor) -> Tensor:
    """The mean over texts of the mean over the tokens that each said: every rank's share of a batch weighs the same."""
    return ((values_NT * said_NT).sum(1) / said_NT.sum(1)).mean()
