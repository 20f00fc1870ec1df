"""The CPU tile version of :func:`megalens.ops.gumbel_embed`: no tensor of the vocabulary's width, forward or backward.

Forward: per tile the logits, folded into running statistics (online soft-max, Milakov and Gimelshein, 2018).
Backward: the tile's logits and noise again. With p = softmax((z + noise * g) / tau) and q = grad @ in_weight.T,
``dz = p * (q - sum(p * q)) / tau``. The sum is known only after the last tile, so ``p * q`` and ``p`` are both multiplied with
the tile and put together at the end. A gradient of the weights needs the sum first: one more pass finds it.

A batch of few rows is bound by reading the embedding, and general matrix products are slow for it: there the products are in
``cpu/few.h`` too, and the embedding is read once per direction, in its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from megalens.ops.native import call
from megalens.ops.noise import split_keys
from megalens.ops.tile import Gradients, HeadGradients, add_product, columns, head_tiles, same_weight, tile_pairs, tile_size, wide

FEW_ROWS = 16
STATE = 6  # top, sum e, sum e * z, noisy top, noisy sum e, z of the token


def _few(hidden_BD: Tensor, *weights: Tensor) -> bool:
    """Whether ``cpu/few.h`` serves these."""
    return len(hidden_BD) <= FEW_ROWS and hidden_BD.dtype in (torch.float32, torch.bfloat16) and all(w.stride(1) == 1 for w in weights)


def forward(
    hidden_BD: Tensor,
    out_weight_VD: Tensor,
    keys_B: Tensor,
    bias_V: Tensor | None,
    tau: float,
    noise: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """ids, log_prob, lse, entropy and the log-sum-exp of the noisy logits over tau, each ``[B]``."""
    rows, keys_2B = hidden_BD.shape[0], split_keys(keys_B)
    state = torch.zeros(STATE, rows, dtype=torch.float64)
    state[[0, 3]] = -torch.inf
    ids_B = torch.zeros(rows, dtype=torch.int64)
    noise_and_sharpness = noise, 1 / tau, torch.get_num_threads()
    if _few(hidden_BD, out_weight_VD):
        hidden, bias_V = hidden_BD.float().contiguous(), None if bias_V is None else bias_V.float().contiguous()
        head = (out_weight_VD, out_weight_VD.stride(0), hidden, hidden.shape[1], bias_V, softcap or 0.0, keys_2B, len(out_weight_VD), rows)
        call("gumbel_few_forward", out_weight_VD.dtype, *head, *noise_and_sharpness, state, ids_B)
    else:
        for tile, _, raw_TB, bias_T in head_tiles(columns(hidden_BD), out_weight_VD, bias_V):
            of_tile = (raw_TB, raw_TB.stride(0), bias_T, softcap or 0.0, keys_2B, tile.start, len(raw_TB), rows)
            call("gumbel_statistics", raw_TB.dtype, *of_tile, *noise_and_sharpness, state, ids_B)
    top, mass, moment, noisy_top, noisy_mass, z_token = state
    lse_B = top + mass.log()
    scalars = z_token - lse_B, lse_B, lse_B - moment / mass, noisy_top / tau + noisy_mass.log()
    return ids_B, *(scalar.to(wide(hidden_BD.dtype)) for scalar in scalars)


def backward(
    grads: Sequence[Tensor],
    hidden_BD: Tensor,
    out_weight_VD: Tensor,
    in_weight_VD: Tensor,
    keys_B: Tensor,
    bias_V: Tensor | None,
    saved: Sequence[Tensor],
    tau: float,
    noise: float,
    softcap: float | None,
    weights: bool,
) -> Gradients:
    """Gradients of ``hidden`` and, where ``weights``, of ``out_weight`` and the bias.

    ``grads``: of embeds, log_prob, lse, entropy. ``saved``: ids, embeds, lse, entropy, noisy lse.
    """
    (grad_BD, *grad_rows), (ids_B, embeds_BD, lse_B, entropy_B, noisy_lse_B) = grads, saved
    q_token_B = (grad_BD.to(lse_B.dtype) * embeds_BD.to(lse_B.dtype)).sum(-1)
    rows_7B = torch.stack([q_token_B, lse_B, noisy_lse_B, entropy_B, *grad_rows])
    keys_2B = split_keys(keys_B)
    if _few(hidden_BD, out_weight_VD, in_weight_VD) and not weights:
        hidden, grad = hidden_BD.float().contiguous(), grad_BD.float().contiguous()
        total_MD = torch.zeros(2 * len(hidden), hidden.shape[1])
        mean_B = torch.zeros(len(hidden), dtype=torch.float64)
        sides = ((out_weight_VD, hidden), (in_weight_VD, grad))
        head = [item for weight, left in sides for item in (weight, weight.stride(0), left, left.shape[1])]
        bias = None if bias_V is None else bias_V.float().contiguous()
        shape = softcap or 0.0, keys_2B, len(out_weight_VD), len(hidden), noise, 1 / tau
        call("gumbel_few_backward", hidden_BD.dtype, *head, bias, *shape, rows_7B, ids_B, torch.get_num_threads(), total_MD, mean_B)
        return put_together(total_MD, mean_B, hidden_BD.dtype), None, None
    hidden_DB, grad_DB = columns(hidden_BD), columns(grad_BD)
    narrow_bias_V = None if bias_V is None else bias_V.to(hidden_DB.dtype).contiguous()

    tied, both_DM = same_weight(out_weight_VD, in_weight_VD), torch.cat([hidden_DB, grad_DB], dim=1)
    scratch_TM = both_DM.new_empty(2, tile_size(out_weight_VD), both_DM.shape[1])

    def factors(mean_B: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each tile with ``[T, 2B]``: the logits' gradient but for the mean of q, and what that mean multiplies. Adds to the mean."""
        for tile, out_TD, in_TD in tile_pairs(out_weight_VD, in_weight_VD):
            logits_TM, factors_TM = scratch_TM[:, : len(out_TD)]
            raw_TB, q_TB = logits_TM.chunk(2, dim=1)
            if tied:
                torch.mm(out_TD, both_DM, out=logits_TM)
            else:
                torch.mm(out_TD, hidden_DB, out=raw_TB)
                torch.mm(in_TD, grad_DB, out=q_TB)
            bias_T = None if narrow_bias_V is None else narrow_bias_V[tile]
            of_tile = (raw_TB, raw_TB.stride(0), q_TB, q_TB.stride(0), bias_T, softcap or 0.0, keys_2B, tile.start, *raw_TB.shape)
            call("gumbel_gradient", raw_TB.dtype, *of_tile, noise, 1 / tau, rows_7B, ids_B, torch.get_num_threads(), factors_TM, mean_B)
            yield tile, out_TD, factors_TM

    return assemble(factors, hidden_BD, out_weight_VD, bias_V, lse_B, weights)


def assemble(
    factors: Callable[[Tensor], Iterable[tuple[slice, Tensor, Tensor]]],
    hidden_BD: Tensor,
    out_weight_VD: Tensor,
    bias_V: Tensor | None,
    lse_B: Tensor,
    weights: bool,
) -> Gradients:
    """Gradients from the tiles' factors. ``factors(mean)`` gives each tile, its embedding and ``[T, 2B]``, and adds to the mean of q."""
    mean_B = torch.zeros_like(lse_B, dtype=torch.float64)
    if not weights:
        total_MD = torch.zeros(2 * len(lse_B), hidden_BD.shape[1], dtype=lse_B.dtype, device=lse_B.device)
        for _, out_TD, factors_TM in factors(mean_B):
            add_product(total_MD, factors_TM, out_TD)
        return put_together(total_MD, mean_B, hidden_BD.dtype), None, None

    for _ in factors(mean_B):
        pass
    gradients = HeadGradients(hidden_BD, out_weight_VD, bias_V, (True, True, bias_V is not None))
    for tile, out_TD, factors_TM in factors(torch.zeros_like(mean_B)):
        gradient_TB, per_mean_TB = factors_TM.chunk(2, dim=1)
        gradient_TB = gradient_TB - (mean_B * per_mean_TB).to(gradient_TB.dtype)
        gradients.add(tile, gradient_TB, out_TD)
    return gradients.found()


def put_together(total_MD: Tensor, mean_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the hidden states from both factors' products and the mean of q."""
    gradient_BD, per_mean_BD = total_MD.chunk(2)
    return (gradient_BD - mean_B[:, None].to(total_MD.dtype) * per_mean_BD).to(dtype)
