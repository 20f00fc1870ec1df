"""What holds the verbalizer near what it was when the training began, on texts that it samples."""

from __future__ import annotations

import torch
from torch import Tensor

from megalens.objective.base import Pass, Term


class ReferenceKl(Term):
    """KL between the verbalizer and the reference per token, in nats, estimated from rollouts; the reference is a constant."""

    name, needs, draws = "reference_kl", frozenset({"rollouts", "reference"}), 1

    def __call__(self, made: Pass) -> Tensor:
        ids_NT, settings = made.rollouts.ids_BKT.flatten(0, 1), made.config.reference
        said_NT = made.log_prob_BKT.flatten(0, 1)
        kl_NT = sampled_kl(said_NT, made.lens.reference_log_prob(made.activation_BD, ids_NT), settings.estimator, settings.clamp)
        return mean_of_texts(kl_NT, made.rollouts.lengths_BK.flatten())


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


def mean_of_texts(values_NT: Tensor, lengths_N: Tensor) -> Tensor:
    """The mean over texts of the mean over each one's tokens: every rank's share of a batch weighs the same.

    Args:
        lengths_N: tokens of each text; the end token behind it counts too where there is one.
    """
    counts_NT = torch.arange(values_NT.shape[1], device=values_NT.device) <= lengths_N[:, None]
    return ((values_NT * counts_NT).sum(1) / counts_NT.sum(1)).mean()
