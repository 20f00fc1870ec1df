"""The tile version of :func:`megalens.ops.vocab_divergences`, on any device: no tensor of the vocabulary's width, forward or backward.

Forward: per tile both sides' logits, folded into running sums of e_p, e_p * z_p, e_p * z_q and their mirror images.
Backward: the tile's logits again. The divergences are known, so the gradient of either side's logits needs no second pass.
What lies between the products is ``cpu/tile.cpp`` on a CPU, and plain torch operations on a tile elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalens.ops.native import call
from megalens.ops.tile import HeadGradients, cap_slope, capped, columns, fold, is_native, same_weight, tile_pairs, tile_size, wide

_Pair = tuple[Tensor, Tensor]  # of p and of q
_Biases = tuple[Tensor | None, Tensor | None]


def _logits(hidden: _Pair, weights: _Pair, biases: _Biases, softcap: float | None) -> Iterator[tuple[slice, Tensor, Tensor, tuple]]:
    """Each tile with its rows of the two embeddings and, as ``cpu/tile.cpp`` takes them, its logits, biases and soft-cap."""
    p_hidden_DN, q_hidden_DN = hidden
    both_DM = torch.cat(hidden, dim=1) if same_weight(*weights) else None
    scratch_TM = p_hidden_DN.new_empty(tile_size(weights[0]), 2 * p_hidden_DN.shape[1])
    p_bias_V, q_bias_V = (None if bias is None else bias.to(scratch_TM.dtype).contiguous() for bias in biases)
    for tile, p_TD, q_TD in tile_pairs(*weights):
        p_raw_TN, q_raw_TN = scratch_TM[: len(p_TD)].chunk(2, dim=1)
        if both_DM is not None:
            torch.mm(p_TD, both_DM, out=scratch_TM[: len(p_TD)])
        else:
            torch.mm(p_TD, p_hidden_DN, out=p_raw_TN)
            torch.mm(q_TD, q_hidden_DN, out=q_raw_TN)
        sides = ((p_raw_TN, p_bias_V), (q_raw_TN, q_bias_V))
        raw = [item for raw_TN, bias_V in sides for item in (raw_TN, raw_TN.stride(0), None if bias_V is None else bias_V[tile])]
        yield tile, p_TD, q_TD, (*raw, softcap or 0.0, *p_raw_TN.shape)


def _statistics(dtype: torch.dtype, *of_tile) -> None:
    """Fold a tile into the state ``[2, 4, N]``."""
    *logits, state = of_tile
    if is_native(state):
        call("kl_statistics", dtype, *logits, torch.get_num_threads(), state)
        return
    z_2TN = torch.stack(_both_capped(*logits))
    top_2N = z_2TN.amax(1)
    e_2TN = (z_2TN - top_2N[:, None]).exp()
    fold(state, top_2N, torch.stack([e_2TN.sum(1), (e_2TN * z_2TN).sum(1), (e_2TN * z_2TN.flip(0)).sum(1)], dim=1))


def _gradient(dtype: torch.dtype, *of_tile) -> None:
    """Write the gradients of a tile's logits into the last two arguments, ``[T, N]`` or None."""
    *logits, rows_10N, p_out_TN, q_out_TN = of_tile
    if is_native(rows_10N):
        call("kl_gradient", dtype, *logits, rows_10N, torch.get_num_threads(), p_out_TN, q_out_TN)
        return
    lses, divergences, entropies, grads, entropy_grads = rows_10N.split(2)
    both_TN, softcap = _both_capped(*logits), logits[6]
    logs = [z_TN - lse_N for z_TN, lse_N in zip(both_TN, lses, strict=True)]
    for side, out_TN in enumerate((p_out_TN, q_out_TN)):
        if out_TN is not None:
            log_own_TN, log_other_TN = logs[side], logs[1 - side]
            of_own_TN = grads[side] * (log_own_TN - log_other_TN - divergences[side]) - entropy_grads[side] * (log_own_TN + entropies[side])
            gradient_TN = log_own_TN.exp() * of_own_TN + grads[1 - side] * (log_own_TN.exp() - log_other_TN.exp())
            out_TN[: len(gradient_TN)] = gradient_TN * cap_slope(both_TN[side], softcap)


def _both_capped(p_raw_TN, _p_stride, p_bias_T, q_raw_TN, _q_stride, q_bias_T, softcap, *_shape) -> list[Tensor]:
    """Both sides' logits of a tile from what :func:`_logits` yields."""
    return [capped(p_raw_TN, p_bias_T, softcap), capped(q_raw_TN, q_bias_T, softcap)]


def forward(hidden: _Pair, weights: _Pair, biases: _Biases, softcap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL(p || q), KL(q || p), the entropies of p and q, and their log-sum-exps, each ``[N]``.

    Args:
        hidden: ``[N, D]`` of p and of q; their ``weights`` ``[V, D]`` and ``biases`` ``[V]`` likewise.
    """
    narrow = columns(hidden[0]), columns(hidden[1])
    # per side: top, sum e, sum e * z, sum e * z of the other side
    state = torch.zeros(2, 4, hidden[0].shape[0], dtype=torch.float64, device=narrow[0].device)
    state[:, 0] = -torch.inf
    for _, _, _, logits in _logits(narrow, weights, biases, softcap):
        _statistics(narrow[0].dtype, *logits, state)
    top, mass, own, other = state.unbind(1)
    lse = top + mass.log()
    own, other = own / mass, other / mass  # the mean logit of the side itself and of the other side
    divergence = (own - lse) - (other - lse.flip(0))
    found = (*divergence, *(lse - own), *lse)
    kl, reverse_kl, p_entropy, q_entropy, p_lse, q_lse = (scalar.to(wide(hidden[0].dtype), copy=True) for scalar in found)
    return kl, reverse_kl, p_entropy, q_entropy, p_lse, q_lse


def backward(
    grads: Sequence[Tensor],
    found: Sequence[Tensor],
    hidden: _Pair,
    weights: _Pair,
    biases: _Biases,
    softcap: float | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the two hidden states, the two embeddings and the two biases, None where not ``wanted``.

    ``grads``: of both divergences and both entropies. ``found``: what :func:`forward` gave.
    """
    divergences_and_entropies, lses = found[:4], found[4:]
    rows_10N = torch.stack([*lses, *divergences_and_entropies, *grads])
    narrow = columns(hidden[0]), columns(hidden[1])
    rows, sides = hidden[0].shape[0], [side for side in (0, 1) if any(wanted[side::2])]
    gradients = [HeadGradients(hidden[side], weights[side], biases[side], wanted[side::2]) for side in (0, 1)]
    scratch = {side: narrow[0].new_empty(tile_size(weights[0]), rows) for side in sides}
    for tile, *embeddings, logits in _logits(narrow, weights, biases, softcap):
        _gradient(narrow[0].dtype, *logits, rows_10N, scratch.get(0), scratch.get(1))
        for side in sides:
            gradients[side].add(tile, scratch[side][: len(embeddings[0])], embeddings[side])
    (p_hidden, p_weight, p_bias), (q_hidden, q_weight, q_bias) = (of_side.found() for of_side in gradients)
    return p_hidden, q_hidden, p_weight, q_weight, p_bias, q_bias
