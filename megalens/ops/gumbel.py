"""Sample one token per row and embed it: decode head, Gumbel noise, arg-max and straight-through embedding in one op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalens.ops import gumbel_tile
from megalens.ops.checks import OpError, cast_under_autocast, check_device, check_head, check_impl, check_softcap, without_autocast
from megalens.ops.implementations import IMPLEMENTATIONS, fastest, triton_version
from megalens.ops.logits import head_logits
from megalens.ops.noise import gumbel
from megalens.ops.tile import wide


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
    arg-max of ``logits + noise * gumbel``: a draw from softmax(logits) at ``noise`` 1, greedy at 0.

    The embedding's value is ``in_weight[ids]``. Its gradient reaches the logits as if it were
    ``softmax((logits + noise * gumbel) / tau) @ in_weight``, and ``in_weight`` as that of its value. Both are exactly what
    ``F.gumbel_softmax(..., hard=True) @ in_weight`` gives.

    ``tile`` and ``triton`` are one registered operator, ``megalens::gumbel_embed``, opaque to ``torch.compile``. They have a first
    derivative only, and no ``vmap``. Under autocast the hidden states are cast to the weights' dtype and the op computes in it.

    Args:
        hidden_BD: last hidden states.
        out_weight_VD: output embedding (the decode head).
        in_weight_VD: input embedding; the same tensor where tied. Its width may differ from the head's.
        tau: temperature of the gradient, above 0.
        keys_B: int64, from :func:`megalens.ops.noise_keys`.
        noise: factor of the Gumbel noise.
        bias_V: bias of the head.
        softcap: the cap of the logits (Gemma), or None.
        impl: ``reference`` (plain PyTorch), ``tile`` (CPU) or ``triton`` (GPU), which keep no ``[B, V]`` tensor, or ``auto``, the fastest
            there is.

    Returns:
        :class:`GumbelEmbed`; the scalars are float32 (float64 for float64 inputs) and differentiable.

    Raises:
        OpError: an argument is wrong.
    """
    hidden_BD = cast_under_autocast(hidden_BD, out_weight_VD)
    _check(hidden_BD, out_weight_VD, in_weight_VD, tau, keys_B, noise, bias_V, softcap, impl)
    if impl == "auto":
        impl = fastest(out_weight_VD)
    with without_autocast(hidden_BD):
        if impl == "reference":
            return _reference(hidden_BD, out_weight_VD, in_weight_VD, tau, keys_B, noise, bias_V, softcap)
        # torch.compile takes a float that enters in any other way for a constant, and a schedule would compile every step again
        one = torch.ones(1, dtype=torch.float64)
        tau_and_noise = torch.cat([one * tau, one * noise])
        return GumbelEmbed(*_operator(hidden_BD, out_weight_VD, in_weight_VD, keys_B, bias_V, tau_and_noise, softcap, impl)[:5])


def _check(hidden_BD, out_weight_VD, in_weight_VD, tau, keys_B, noise, bias_V, softcap, impl) -> None:
    """Refuse arguments that are wrong."""
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


def _implementation(impl: str, weight_VD: Tensor):
    """The module of an implementation, or the error that says why it cannot serve these weights."""
    if impl == "tile":
        if weight_VD.device.type != "cpu":
            raise OpError(f'gumbel_embed: impl="tile" is for a CPU, and the weights are on {weight_VD.device}: use "auto"')
        return gumbel_tile
    return triton_version("gumbel_embed", weight_VD, "gumbel_triton")


def _reference(hidden_BD, out_weight_VD, in_weight_VD, tau, keys_B, noise, bias_V, softcap) -> GumbelEmbed:
    """Plain PyTorch and autograd: what every other implementation must equal."""
    logits_BV = head_logits(hidden_BD, out_weight_VD, bias_V, softcap)
    log_p_BV = logits_BV.log_softmax(-1)
    noisy_BV = logits_BV
    if noise != 0:
        noisy_BV = logits_BV + noise * gumbel(keys_B, logits_BV.shape[1])
    ids_B = noisy_BV.argmax(-1)
    soft_BD = (noisy_BV / tau).softmax(-1).to(in_weight_VD.dtype) @ in_weight_VD.detach()
    return GumbelEmbed(
        ids=ids_B,
        embeds=in_weight_VD[ids_B] + (soft_BD - soft_BD.detach()),
        log_prob=log_p_BV.gather(-1, ids_B[:, None])[:, 0],
        lse=logits_BV.logsumexp(-1),
        entropy=-(log_p_BV.exp() * log_p_BV).sum(-1),
    )


@torch.library.custom_op("megalens::gumbel_embed", mutates_args=())
def _operator(
    hidden_BD: Tensor,
    out_weight_VD: Tensor,
    in_weight_VD: Tensor,
    keys_B: Tensor,
    bias_V: Tensor | None,
    tau_and_noise: Tensor,
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`GumbelEmbed` and the log-sum-exp of the noisy logits over tau, which the backward needs."""
    forward = _implementation(impl, out_weight_VD).forward
    ids_B, *scalars, noisy_lse_B = forward(hidden_BD, out_weight_VD, keys_B, bias_V, *tau_and_noise.tolist(), softcap)
    return ids_B, in_weight_VD[ids_B], *scalars, noisy_lse_B


@_operator.register_fake
def _(hidden_BD, out_weight_VD, in_weight_VD, keys_B, bias_V, tau_and_noise, softcap, impl):
    scalars = [hidden_BD.new_empty(hidden_BD.shape[0], dtype=wide(hidden_BD.dtype)) for _ in range(4)]
    return torch.empty_like(keys_B), in_weight_VD.new_empty(hidden_BD.shape[0], in_weight_VD.shape[1]), *scalars


@torch.library.custom_op("megalens::gumbel_embed_backward", mutates_args=())
def _backward_operator(
    grads: list[Tensor],
    inputs: list[Tensor],
    bias_V: Tensor | None,
    saved: list[Tensor],
    tau_and_noise: Tensor,
    softcap: float | None,
    weights: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, out_weight and bias, the latter two empty unless ``weights``."""
    hidden_BD, out_weight_VD, in_weight_VD, keys_B = inputs
    found = _implementation(impl, out_weight_VD).backward(
        grads, hidden_BD, out_weight_VD, in_weight_VD, keys_B, bias_V, saved, *tau_and_noise.tolist(), softcap, weights
    )
    of_hidden, of_weight, of_bias = (hidden_BD.new_empty(0) if gradient is None else gradient for gradient in found)
    return of_hidden, of_weight, of_bias


@_backward_operator.register_fake
def _(grads, inputs, bias_V, saved, tau_and_noise, softcap, weights, impl):
    hidden_BD, out_weight_VD, _, _ = inputs
    found = (hidden_BD, out_weight_VD if weights else None, bias_V if weights else None)
    return tuple(hidden_BD.new_empty(0) if like is None else torch.empty_like(like) for like in found)


def _save(ctx, inputs, output) -> None:
    hidden_BD, out_weight_VD, in_weight_VD, keys_B, bias_V, tau_and_noise, ctx.softcap, ctx.impl = inputs
    ids_B, embeds_BD, _, lse_B, entropy_B, noisy_lse_B = output
    ctx.save_for_backward(
        hidden_BD, out_weight_VD, in_weight_VD, keys_B, bias_V, tau_and_noise, ids_B, embeds_BD, lse_B, entropy_B, noisy_lse_B
    )
    ctx.mark_non_differentiable(ids_B, noisy_lse_B)


def _backward(ctx, _ids, grad_embeds_BD, grad_log_prob_B, grad_lse_B, grad_entropy_B, _noisy_lse):
    hidden_BD, out_weight_VD, in_weight_VD, keys_B, bias_V, tau_and_noise, *saved = ctx.saved_tensors
    needs_hidden, needs_out, needs_in, _, needs_bias = ctx.needs_input_grad[:5]
    grads = [grad_embeds_BD, grad_log_prob_B, grad_lse_B, grad_entropy_B]
    grad_hidden_BD = grad_out_VD = grad_in_VD = grad_bias_V = None
    if needs_hidden or needs_out or needs_bias:
        grad_hidden_BD, grad_out_VD, grad_bias_V = _backward_operator(
            grads,
            [hidden_BD, out_weight_VD, in_weight_VD, keys_B],
            bias_V,
            saved,
            tau_and_noise,
            ctx.softcap,
            needs_out or needs_bias,
            ctx.impl,
        )
    if needs_in:
        grad_in_VD = torch.zeros_like(in_weight_VD).index_add(0, saved[0], grad_embeds_BD)
    return grad_hidden_BD, grad_out_VD if needs_out else None, grad_in_VD, None, grad_bias_V if needs_bias else None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


@_operator.register_vmap
def _(info, in_dims, *args):
    raise OpError('gumbel_embed: no vmap but over impl="reference"; fold the mapped dimension into the batch')
