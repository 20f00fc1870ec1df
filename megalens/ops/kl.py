"""KL divergence of two next-token distributions, from hidden states and output embeddings."""

from __future__ import annotations

from torch import Tensor

from megalens.ops.checks import OpError, check_device, check_head, check_impl, check_softcap
from megalens.ops.gumbel import head_logits

IMPLEMENTATIONS = ("reference",)


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
    """``KL(p || q)`` of each row in nats, where p and q are the softmax of ``hidden @ weight.T + bias`` (soft-capped where asked).

    Args:
        p_hidden_ND, q_hidden_ND: hidden states, one row per position; the widths of the two sides may differ.
        p_weight_VD, q_weight_VD: output embeddings over one vocabulary; may be the same tensor.
        p_bias, q_bias: biases ``[V]`` of the heads.
        softcap: the cap of both sides' logits (Gemma), or None.
        impl: ``auto`` or one of ``IMPLEMENTATIONS``.

    Returns:
        float32 ``[N]`` (float64 for float64 inputs), with gradients to both sides where they require them.

    Raises:
        OpError: an argument is wrong.
    """
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
    return _reference(p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias, q_bias, softcap)


def _reference(p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias, q_bias, softcap) -> Tensor:
    """Plain PyTorch and autograd: what every other implementation must equal."""
    log_p_NV = head_logits(p_hidden_ND, p_weight_VD, p_bias, softcap).log_softmax(-1)
    log_q_NV = head_logits(q_hidden_ND, q_weight_VD, q_bias, softcap).log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
