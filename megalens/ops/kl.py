"""KL divergences of two next-token distributions, from hidden states and output embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalens.ops import kl_tile
from megalens.ops.checks import OpError, cast_under_autocast, check_device, check_head, check_impl, check_softcap, without_autocast
from megalens.ops.logits import head_logits
from megalens.ops.tile import tiles_pay, wide

IMPLEMENTATIONS = ("reference", "tile")


class Divergences(NamedTuple):
    """What :func:`vocab_divergences` gives for each of N rows, float32 ``[N]``, in nats, differentiable."""

    kl: Tensor  # KL(p || q)
    reverse_kl: Tensor  # KL(q || p)
    p_entropy: Tensor
    q_entropy: Tensor


def vocab_kl(
    p_hidden_ND: Tensor,
    q_hidden_ND: Tensor,
    p_weight_VD: Tensor,
    q_weight_VD: Tensor,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """``KL(p || q)`` of each row, float32 ``[N]``: the first of :func:`vocab_divergences`, whose arguments these are."""
    return vocab_divergences(
        p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias=p_bias, q_bias=q_bias, softcap=softcap, impl=impl
    ).kl


def vocab_divergences(
    p_hidden_ND: Tensor,
    q_hidden_ND: Tensor,
    p_weight_VD: Tensor,
    q_weight_VD: Tensor,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Divergences:
    """Both KL divergences and both entropies of p and q, the softmax of ``hidden @ weight.T + bias`` (soft-capped if asked), in one pass.

    Args:
        p_hidden_ND, q_hidden_ND: hidden states, one row per position; the widths of the two sides may differ.
        p_weight_VD, q_weight_VD: output embeddings over one vocabulary; may be the same tensor.
        p_bias, q_bias: biases ``[V]`` of the heads.
        softcap: the cap of both sides' logits (Gemma), or None.
        impl: ``reference`` (plain PyTorch), ``tile`` (keeps no ``[N, V]`` tensor) or ``auto``: tiles where they pay. ``tile`` is a
            registered operator, as :func:`megalens.ops.gumbel_embed` is, with its limits.

    Returns:
        :class:`Divergences` (float64 for float64 inputs), with gradients to both sides where they require them.

    Raises:
        OpError: an argument is wrong.
    """
    p_hidden_ND, q_hidden_ND = cast_under_autocast(p_hidden_ND, p_weight_VD), cast_under_autocast(q_hidden_ND, q_weight_VD)
    check_head("vocab_kl", "p_", p_hidden_ND, p_weight_VD, p_bias)
    check_head("vocab_kl", "q_", q_hidden_ND, q_weight_VD, q_bias)
    check_softcap("vocab_kl", softcap)
    check_impl("vocab_kl", impl, IMPLEMENTATIONS)
    check_device("vocab_kl", p_hidden=p_hidden_ND, q_hidden=q_hidden_ND)
    if p_hidden_ND.shape[0] != q_hidden_ND.shape[0]:
        raise OpError(f"vocab_kl: p_hidden has {p_hidden_ND.shape[0]} rows and q_hidden {q_hidden_ND.shape[0]}: one row each per position")
    if p_weight_VD.shape[0] != q_weight_VD.shape[0]:
        raise OpError(f"vocab_kl: p_weight has {p_weight_VD.shape[0]} ids and q_weight {q_weight_VD.shape[0]}: KL needs one vocabulary")
    if p_weight_VD.dtype != q_weight_VD.dtype:
        raise OpError(f"vocab_kl: p_weight is {p_weight_VD.dtype} and q_weight {q_weight_VD.dtype}: give both one dtype")
    if impl == "auto":
        impl = "tile" if p_weight_VD.device.type != "cpu" or tiles_pay(p_weight_VD) else "reference"
    with without_autocast(p_hidden_ND):
        function = _reference if impl == "reference" else _operator
        return Divergences(*function(p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias, q_bias, softcap)[:4])


def _reference(p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias_V, q_bias_V, softcap) -> tuple[Tensor, ...]:
    """Plain PyTorch and autograd: what every other implementation must equal."""
    log_p_NV = head_logits(p_hidden_ND, p_weight_VD, p_bias_V, softcap).log_softmax(-1)
    log_q_NV = head_logits(q_hidden_ND, q_weight_VD, q_bias_V, softcap).log_softmax(-1)
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    ratio_NV = log_p_NV - log_q_NV
    return (p_NV * ratio_NV).sum(-1), -(q_NV * ratio_NV).sum(-1), -(p_NV * log_p_NV).sum(-1), -(q_NV * log_q_NV).sum(-1)


@torch.library.custom_op("megalens::vocab_divergences", mutates_args=())
def _operator(
    p_hidden_ND: Tensor,
    q_hidden_ND: Tensor,
    p_weight_VD: Tensor,
    q_weight_VD: Tensor,
    p_bias_V: Tensor | None,
    q_bias_V: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`Divergences` and both log-sum-exps, which the backward needs."""
    return kl_tile.forward((p_hidden_ND, q_hidden_ND), (p_weight_VD, q_weight_VD), (p_bias_V, q_bias_V), softcap)


@_operator.register_fake
def _(p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias_V, q_bias_V, softcap):
    return tuple(p_hidden_ND.new_empty(p_hidden_ND.shape[0], dtype=wide(p_hidden_ND.dtype)) for _ in range(6))


@torch.library.custom_op("megalens::vocab_divergences_backward", mutates_args=())
def _backward_operator(
    grads: list[Tensor],
    found: list[Tensor],
    hidden_and_weights: list[Tensor],
    p_bias_V: Tensor | None,
    q_bias_V: Tensor | None,
    softcap: float | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of both hidden states, both embeddings and both biases, empty where not ``wanted``."""
    p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD = hidden_and_weights
    hidden, weights, biases = (p_hidden_ND, q_hidden_ND), (p_weight_VD, q_weight_VD), (p_bias_V, q_bias_V)
    gradients = kl_tile.backward(grads, found, hidden, weights, biases, softcap, wanted)
    return [p_hidden_ND.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward_operator.register_fake
def _(grads, found, hidden_and_weights, p_bias_V, q_bias_V, softcap, wanted):
    inputs = (*hidden_and_weights, p_bias_V, q_bias_V)
    return [torch.empty_like(t) if want else inputs[0].new_empty(0) for t, want in zip(inputs, wanted, strict=True)]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[4:])


def _backward(ctx, *grads):
    *hidden_and_weights, p_bias_V, q_bias_V = ctx.saved_tensors[:6]
    wanted = list(ctx.needs_input_grad[:6])
    found = _backward_operator(list(grads[:4]), list(ctx.saved_tensors[6:]), hidden_and_weights, p_bias_V, q_bias_V, ctx.softcap, wanted)
    return *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), None


_operator.register_autograd(_backward, setup_context=_save)


@_operator.register_vmap
def _(info, in_dims, *args):
    raise OpError('vocab_kl: no vmap over impl="tile"; fold the mapped dimension into the rows, or use impl="reference"')
