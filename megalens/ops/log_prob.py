"""Log-probability of given tokens, from hidden states and the output embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalens.ops import log_prob_tile
from megalens.ops.checks import OpError, cast_under_autocast, check_head, check_ids, check_impl, check_softcap, without_autocast
from megalens.ops.implementations import IMPLEMENTATIONS, fastest, triton_version
from megalens.ops.logits import head_logits
from megalens.ops.tile import wide


class LogProb(NamedTuple):
    """What :func:`vocab_log_prob` gives for each of N rows, float32 ``[N]``, in nats, differentiable."""

    log_prob: Tensor  # of the given token
    entropy: Tensor  # of the distribution it was scored by


def vocab_log_prob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> LogProb:
    """Log-probability of one given token per row under the softmax of ``hidden @ weight.T + bias`` (soft-capped if asked).

    The same numbers as ``-F.cross_entropy(logits, ids, reduction="none")`` without the logits. The entropy comes from the same pass.

    Args:
        hidden_ND: hidden states, one row per token.
        weight_VD: output embedding.
        ids_N: int64, the tokens.
        bias_V: bias of the head.
        softcap: the cap of the logits (Gemma), or None.
        impl: ``reference`` (plain PyTorch), ``tile`` (any device) or ``triton`` (GPU), which keep no ``[N, V]`` tensor, or ``auto``, the
            fastest there is. ``tile`` and ``triton`` are a registered operator, as :func:`megalens.ops.gumbel_embed` is, with its limits.

    Returns:
        :class:`LogProb` (float64 for float64 inputs), with gradients to hidden states, embedding and bias where they require them.

    Raises:
        OpError: an argument is wrong. An id beyond the vocabulary is one on a CPU. On a GPU nobody waits to look at the ids:
            there the log-probability of such an id is NaN (with ``reference``, PyTorch's own assertion fails).
    """
    hidden_ND = cast_under_autocast(hidden_ND, weight_VD)
    check_head("vocab_log_prob", "", hidden_ND, weight_VD, bias_V)
    check_softcap("vocab_log_prob", softcap)
    check_impl("vocab_log_prob", impl, IMPLEMENTATIONS)
    check_ids("vocab_log_prob", ids_N, hidden_ND, weight_VD)
    if impl == "auto":
        impl = fastest(weight_VD)
    with without_autocast(hidden_ND):
        if impl == "reference":
            return _reference(hidden_ND, weight_VD, ids_N, bias_V, softcap)
        return LogProb(*_operator(hidden_ND, weight_VD, ids_N, bias_V, softcap, impl)[:2])


def _reference(hidden_ND, weight_VD, ids_N, bias_V, softcap) -> LogProb:
    """Plain PyTorch and autograd: what every other implementation must equal."""
    log_p_NV = head_logits(hidden_ND, weight_VD, bias_V, softcap).log_softmax(-1)
    return LogProb(log_p_NV.gather(-1, ids_N[:, None])[:, 0], -(log_p_NV.exp() * log_p_NV).sum(-1))


def _implementation(impl: str, weight_VD: Tensor):
    """The module of an implementation."""
    return log_prob_tile if impl == "tile" else triton_version("vocab_log_prob", weight_VD, "log_prob_triton")


@torch.library.custom_op("megalens::vocab_log_prob", mutates_args=())
def _operator(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, bias_V: Tensor | None, softcap: float | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of :class:`LogProb` and the log-sum-exp, which the backward needs."""
    return _implementation(impl, weight_VD).forward(hidden_ND, weight_VD, ids_N, bias_V, softcap)


@_operator.register_fake
def _(hidden_ND, weight_VD, ids_N, bias_V, softcap, impl):
    return tuple(hidden_ND.new_empty(hidden_ND.shape[0], dtype=wide(hidden_ND.dtype)) for _ in range(3))


@torch.library.custom_op("megalens::vocab_log_prob_backward", mutates_args=())
def _backward_operator(
    grads: list[Tensor],
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    bias_V: Tensor | None,
    found: list[Tensor],
    softcap: float | None,
    wanted: list[bool],
    impl: str,
) -> list[Tensor]:
    """Gradients of hidden states, embedding and bias, empty where not ``wanted``."""
    backward = _implementation(impl, weight_VD).backward
    gradients = backward(grads, hidden_ND, weight_VD, ids_N, bias_V, found, softcap, wanted)
    return [hidden_ND.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_backward_operator.register_fake
def _(grads, hidden_ND, weight_VD, ids_N, bias_V, found, softcap, wanted, impl):
    inputs = hidden_ND, weight_VD, bias_V
    return [torch.empty_like(t) if want else hidden_ND.new_empty(0) for t, want in zip(inputs, wanted, strict=True)]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.softcap, ctx.impl = inputs
    _, *found = output
    ctx.save_for_backward(*tensors, *found)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, grad_log_prob_N, grad_entropy_N, _lse):
    hidden_ND, weight_VD, ids_N, bias_V, *found = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    wanted = [needs_hidden, needs_weight, needs_bias]
    grads = [grad_log_prob_N, grad_entropy_N]
    gradients = _backward_operator(grads, hidden_ND, weight_VD, ids_N, bias_V, found, ctx.softcap, wanted, ctx.impl)
    of_hidden, of_weight, of_bias = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return of_hidden, of_weight, None, of_bias, None, None


_operator.register_autograd(_backward, setup_context=_save)


@_operator.register_vmap
def _(info, in_dims, *args):
    raise OpError('vocab_log_prob: no vmap but over impl="reference"; fold the mapped dimension into the rows')
