"""Whole rows of logits, as the vocabulary ops' references compute them."""

from __future__ import annotations

import torch
from torch import Tensor


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None) -> Tensor:
    """Logits ``[N, V]``: the product in the weights' dtype, everything after it in float32 (float64 for float64 weights)."""
    logits_NV = hidden_ND @ weight_VD.T
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(logits_NV.dtype)
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)
