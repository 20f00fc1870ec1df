"""The tile version of :func:`megalens.ops.vocab_log_prob`, on any device: no tensor of the vocabulary's width, forward or backward.

Forward: per tile the logits, folded into running sums of e and e * z (online soft-max), and the logit of each row's token.
Backward: the tile's logits again, and in their place their gradient, which is multiplied with the tile.
What lies between the products is ``cpu/tile.cpp`` on a CPU, and plain torch operations on a tile elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalens.ops.native import call
from megalens.ops.tile import Gradients, HeadGradients, cap_slope, capped, columns, fold, head_tiles, is_native, tile_size, wide


def _statistics(raw_TN: Tensor, bias_T: Tensor | None, softcap: float | None, ids_N: Tensor, first_id: int, state_4N: Tensor) -> None:
    """Fold a tile into the state: top, sum e, sum e * z, z of the token."""
    if is_native(raw_TN):
        of_tile = raw_TN, raw_TN.stride(0), bias_T, softcap or 0.0, ids_N, first_id, *raw_TN.shape
        call("log_prob_statistics", raw_TN.dtype, *of_tile, torch.get_num_threads(), state_4N)
        return
    z_TN = capped(raw_TN, bias_T, softcap)
    top_N = z_TN.amax(0)
    e_TN = (z_TN - top_N).exp()
    fold(state_4N[:3], top_N, torch.stack([e_TN.sum(0), (e_TN * z_TN).sum(0)]))
    at_1N, here_N = _place(ids_N, first_id, len(z_TN))
    state_4N[3] = torch.where(here_N, z_TN.gather(0, at_1N)[0].double(), state_4N[3])


def _gradient(raw_TN: Tensor, bias_T: Tensor | None, softcap: float | None, ids_N: Tensor, first_id: int, rows_4N: Tensor) -> None:
    """Put the gradient of a tile's logits in their place. ``rows_4N``: lse, entropy, and the gradients of log-probability and entropy."""
    if is_native(raw_TN):
        of_tile = raw_TN, raw_TN.stride(0), bias_T, softcap or 0.0, ids_N, first_id, *raw_TN.shape
        call("log_prob_gradient", raw_TN.dtype, *of_tile, rows_4N, torch.get_num_threads(), raw_TN)
        return
    lse_N, entropy_N, grad_log_prob_N, grad_entropy_N = rows_4N
    z_TN = capped(raw_TN, bias_T, softcap)
    log_p_TN = z_TN - lse_N
    gradient_TN = log_p_TN.exp() * (-grad_log_prob_N - grad_entropy_N * (log_p_TN + entropy_N))
    at_1N, here_N = _place(ids_N, first_id, len(z_TN))
    gradient_TN.scatter_add_(0, at_1N, torch.where(here_N, grad_log_prob_N, 0.0)[None])
    raw_TN.copy_(gradient_TN * cap_slope(z_TN, softcap))


def _place(ids_N: Tensor, first_id: int, size: int) -> tuple[Tensor, Tensor]:
    """Each row's token as a place ``[1, N]`` in a tile, and whether it lies there ``[N]``."""
    at_N = ids_N - first_id
    return at_N.clamp(0, size - 1)[None], (at_N >= 0) & (at_N < size)


def forward(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, bias_V: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and log-sum-exp, each ``[N]``; the log-probability of an id beyond the vocabulary is NaN."""
    state_4N = torch.zeros(4, len(hidden_ND), dtype=torch.float64, device=hidden_ND.device)
    state_4N[0], state_4N[3] = -torch.inf, torch.nan
    ids_N, size = ids_N.contiguous(), tile_size(weight_VD, len(hidden_ND))
    for tile, _, raw_TN, bias_T in head_tiles(columns(hidden_ND), weight_VD, bias_V, size):
        _statistics(raw_TN, bias_T, softcap, ids_N, tile.start, state_4N)
    top_N, mass_N, moment_N, z_token_N = state_4N
    lse_N = top_N + mass_N.log()
    dtype = wide(hidden_ND.dtype)
    return (z_token_N - lse_N).to(dtype), (lse_N - moment_N / mass_N).to(dtype), lse_N.to(dtype)


def backward(
    grads: Sequence[Tensor],
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    bias_V: Tensor | None,
    found: Sequence[Tensor],
    softcap: float | None,
    wanted: Sequence[bool],
) -> Gradients:
    """Gradients of hidden states, embedding and bias, None where not ``wanted``.

    ``grads``: of log-probability and entropy. ``found``: entropy and log-sum-exp.
    """
    entropy_N, lse_N = found
    rows_4N = torch.stack([lse_N, entropy_N, *grads])
    gradients = HeadGradients(hidden_ND, weight_VD, bias_V, wanted)
    ids_N, size = ids_N.contiguous(), tile_size(weight_VD, len(hidden_ND))
    for tile, weight_TD, raw_TN, bias_T in head_tiles(columns(hidden_ND), weight_VD, bias_V, size):
        _gradient(raw_TN, bias_T, softcap, ids_N, tile.start, rows_4N)
        gradients.add(tile, raw_TN, weight_TD)
    return gradients.found()
