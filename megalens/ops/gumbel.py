"""Sample one token per row and embed it: decode head, Gumbel noise, arg-max and straight-through embedding in one op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalens.ops.checks import OpError, check_device, check_head, check_impl, check_softcap
from megalens.ops.noise import gumbel, split_keys

IMPLEMENTATIONS = ("reference",)


class GumbelEmbed(NamedTuple):
    """What :func:`gumbel_embed` gives for each of B rows."""

    ids: Tensor  # int64 [B]: the chosen token
    embeds: Tensor  # [B, D]: its input embedding, with a straight-through gradient
    log_prob: Tensor  # float32 [B]: of the token under softmax(logits), no noise, no temperature
    lse: Tensor  # float32 [B]: log-sum-exp of the logits
    entropy: Tensor  # float32 [B]: of softmax(logits), in nats


def gumbel_embed(
    hidden_BD: Tensor,
    out_weight_VD: Tensor,
    in_weight_VD: Tensor,
    tau: float,
    keys_B: Tensor,
    *,
    noise: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> GumbelEmbed:
    """Draw a token per row by the Gumbel-max trick and embed it with a straight-through gradient (Jang et al., 2017).

    ``logits = hidden @ out_weight.T + bias``, soft-capped as ``softcap * tanh(logits / softcap)`` where asked. The token is the
    arg-max of ``logits + noise * gumbel`` (so a draw from softmax(logits) at ``noise`` 1, greedy at 0). The embedding's value is
    ``in_weight[ids]``; its gradient reaches the logits as that of ``softmax((logits + noise * gumbel) / tau) @ in_weight``, and
    ``in_weight`` as that of its value, exactly as ``F.gumbel_softmax(..., hard=True) @ in_weight`` does.

    Args:
        hidden_BD: last hidden states.
        out_weight_VD: output embedding (the decode head).
        in_weight_VD: input embedding; the same tensor where tied. Its width may differ from the head's.
        tau: temperature of the gradient, above 0.
        keys_B: int64, from :func:`megalens.ops.noise_keys`.
        noise: factor of the Gumbel noise.
        bias_V: bias of the head.
        softcap: the cap of the logits (Gemma), or None.
        impl: ``auto`` or one of ``IMPLEMENTATIONS``.

    Returns:
        :class:`GumbelEmbed`; the scalars are float32 (float64 for float64 inputs) and differentiable.

    Raises:
        OpError: an argument is wrong.
    """
    check_head("gumbel_embed", "", hidden_BD, out_weight_VD, bias_V)
    check_softcap("gumbel_embed", softcap)
    check_impl("gumbel_embed", impl, IMPLEMENTATIONS)
    if not tau > 0:
        raise OpError(f"gumbel_embed: tau must be above 0, not {tau}")
    if not noise >= 0:
        raise OpError(f"gumbel_embed: noise must be 0 or more, not {noise}")
    if in_weight_VD.dim() != 2 or in_weight_VD.shape[0] != out_weight_VD.shape[0] or in_weight_VD.dtype != out_weight_VD.dtype:
        raise OpError(
            f"gumbel_embed: in_weight {list(in_weight_VD.shape)} {in_weight_VD.dtype} must have out_weight's rows and dtype"
            f" ({out_weight_VD.shape[0]}, {out_weight_VD.dtype})"
        )
    if keys_B.dtype != torch.int64 or keys_B.shape != hidden_BD.shape[:1]:
        raise OpError(f"gumbel_embed: keys must be int64 [{hidden_BD.shape[0]}], one per row, not {keys_B.dtype} {list(keys_B.shape)}")
    check_device("gumbel_embed", hidden=hidden_BD, in_weight=in_weight_VD, keys=keys_B)
    return _reference(hidden_BD, out_weight_VD, in_weight_VD, tau, keys_B, noise, bias_V, softcap)


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Logits ``[N, V]``: the product in the weights' dtype, everything after it in float32 (float64 for float64 weights)."""
    logits_NV = hidden_ND @ weight_VD.T
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(logits_NV.dtype)
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def _reference(hidden_BD, out_weight_VD, in_weight_VD, tau, keys_B, noise, bias_V, softcap) -> GumbelEmbed:
    """Plain PyTorch and autograd: what every other implementation must equal."""
    logits_BV = head_logits(hidden_BD, out_weight_VD, bias_V, softcap)
    log_p_BV = logits_BV.log_softmax(-1)
    noisy_BV = logits_BV
    if noise != 0:
        low_B, high_B = split_keys(keys_B)
        ids_V = torch.arange(logits_BV.shape[1], dtype=torch.int32, device=logits_BV.device)
        noisy_BV = logits_BV + noise * gumbel(low_B, high_B, ids_V, logits_BV.dtype)
    ids_B = noisy_BV.argmax(-1)
    soft_BD = (noisy_BV / tau).softmax(-1).to(in_weight_VD.dtype) @ in_weight_VD.detach()
    return GumbelEmbed(
        ids=ids_B,
        embeds=in_weight_VD[ids_B] + (soft_BD - soft_BD.detach()),
        log_prob=log_p_BV.gather(-1, ids_B[:, None])[:, 0],
        lse=logits_BV.logsumexp(-1),
        entropy=-(log_p_BV.exp() * log_p_BV).sum(-1),
    )
