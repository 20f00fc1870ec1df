"""The terms of the loss, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from megalens.families.causal_lm import CausalLM
from megalens.ops import vocab_kl


def relative_mse(a_BD: Tensor, a_hat_BD: Tensor) -> Tensor:
    """``|a - a_hat|^2 / |a|^2``, mean over rows; 1 for a rebuild of zero."""
    a_BD = a_BD.to(a_hat_BD.dtype)
    return ((a_BD - a_hat_BD).square().sum(-1) / a_BD.square().sum(-1).clamp_min(1e-12)).mean()


def token_mean(x_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
    """Mean over rows of each row's mean over its tokens, so that any division of a batch among ranks gives the same.

    Args:
        x_BT: a figure of each token.
        weight_BT: the weight of each, or which of them count; None: all alike. A row without any counts as 0.
    """
    if weight_BT is None:
        return x_BT.mean()
    weight_BT = weight_BT.to(x_BT.dtype)
    return ((x_BT.where(weight_BT > 0, 0.0) * weight_BT).sum(1) / weight_BT.sum(1).clamp_min(1e-12)).mean()


def kl_from_logits(p_logits_BV: Tensor, q_logits_BV: Tensor) -> Tensor:
    """KL(p || q) per row, in nats."""
    p, q = p_logits_BV.log_softmax(-1), q_logits_BV.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def next_token_kl(lm: CausalLM, p_ND: Tensor, q_ND: Tensor) -> Tensor:
    """KL(p || q) per row ``[N]``, in nats, of next-token distributions given by normed hidden states."""
    return lm.vocabulary(lambda out, _, bias: vocab_kl(p_ND, q_ND, out, out, p_bias=bias, q_bias=bias, softcap=lm.softcap))


def resample_error(a_BD: Tensor, a_hat_BD: Tensor) -> Tensor:
    """``a' - a_hat'`` of each row's partner, detached: the error another sample's rebuild makes (resample ablation).

    Partners are neighbours (rows 2i and 2i + 1), so that an even share of a global batch gives the same pairs on any number of ranks.

    Raises:
        ValueError: an odd number of rows.
    """
    if len(a_BD) % 2:
        raise ValueError(f"{len(a_BD)} rows on a rank cannot be paired: batch_size / ranks must be even when kl_base_weight is not 0")
    error_BD = (a_BD - a_hat_BD).detach()
    return error_BD.view(-1, 2, error_BD.shape[-1]).flip(1).reshape(error_BD.shape)


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The loss: what has a weight, times it. A term of weight 0 takes no part in the backward pass."""
    return torch.stack([weights[name] * value for name, value in terms.items() if weights.get(name)]).sum()
