"""The CPU tile version of :func:`megalens.ops.vocab_divergences`: no tensor of the vocabulary's width, forward or backward.

Forward: per tile both sides' logits, folded into running sums of e_p, e_p * z_p, e_p * z_q and their mirror images.
Backward: the tile's logits again; with all divergences known, the gradient of either side's logits needs no second pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from megalens.ops.native import call
from megalens.ops.tile import add_product, columns, same_weight, tile_size, tiles, wide


def _logits(p_hidden_DN, q_hidden_DN, p_weight_VD, q_weight_VD, p_bias_V, q_bias_V, softcap) -> Iterator[tuple]:
    """Each tile with its rows of the two embeddings and, as ``tile.cpp`` takes them, its logits, biases and soft-cap."""
    rows, tied = p_hidden_DN.shape[1], same_weight(p_weight_VD, q_weight_VD)
    both_DM = torch.cat([p_hidden_DN, q_hidden_DN], dim=1) if tied else None
    scratch_TM = p_hidden_DN.new_empty(tile_size(p_weight_VD), 2 * rows)
    p_bias_V, q_bias_V = (None if bias is None else bias.to(scratch_TM.dtype).contiguous() for bias in (p_bias_V, q_bias_V))
    q_tiles = repeat((None, None)) if tied else tiles(q_weight_VD)
    for (tile, p_TD), (_, q_TD) in zip(tiles(p_weight_VD), q_tiles, strict=False):
        p_raw_TN, q_raw_TN = scratch_TM[: len(p_TD)].chunk(2, dim=1)
        if tied:
            torch.mm(p_TD, both_DM, out=scratch_TM[: len(p_TD)])
        else:
            torch.mm(p_TD, p_hidden_DN, out=p_raw_TN)
            torch.mm(q_TD, q_hidden_DN, out=q_raw_TN)
        sides = ((p_raw_TN, p_bias_V), (q_raw_TN, q_bias_V))
        raw = [item for raw_TN, bias_V in sides for item in (raw_TN, raw_TN.stride(0), None if bias_V is None else bias_V[tile])]
        yield tile, p_TD, p_TD if tied else q_TD, (*raw, softcap or 0.0, *p_raw_TN.shape)


def forward(p_hidden_ND, q_hidden_ND, p_weight_VD, q_weight_VD, p_bias_V, q_bias_V, softcap) -> tuple[Tensor, ...]:
    """KL(p || q), KL(q || p), the entropies of p and q, and their log-sum-exps, each ``[N]``."""
    hidden = columns(p_hidden_ND), columns(q_hidden_ND)
    state = torch.zeros(2, 4, p_hidden_ND.shape[0], dtype=torch.float64)  # per side: top, sum e, sum e * z, sum e * z of the other side
    state[:, 0] = -torch.inf
    for _, _, _, logits in _logits(*hidden, p_weight_VD, q_weight_VD, p_bias_V, q_bias_V, softcap):
        call("kl_statistics", hidden[0].dtype, *logits, torch.get_num_threads(), state)
    top, mass, own, other = state.unbind(1)
    lse = top + mass.log()
    own, other = own / mass, other / mass  # the mean logit of the side itself and of the other side
    divergence = (own - lse) - (other - lse.flip(0))
    return tuple(found.to(wide(p_hidden_ND.dtype), copy=True) for found in (*divergence, *(lse - own), *lse))


def backward(grads, found, hidden, weights, biases, softcap: float | None, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the two hidden states, the two embeddings and the two biases, None where not ``wanted``.

    ``grads``: of both divergences and both entropies. ``found``: what :func:`forward` gave.
    """
    divergences_and_entropies, lses = found[:4], found[4:]
    rows_10N = torch.stack([*lses, *divergences_and_entropies, *grads])
    narrow = columns(hidden[0]), columns(hidden[1])
    rows, dtype = hidden[0].shape[0], lses[0].dtype
    totals = [torch.zeros_like(h, dtype=dtype) if want else None for h, want in zip(hidden, wanted[:2], strict=True)]
    others = [torch.empty_like(t) if want else None for t, want in zip((*weights, *biases), wanted[2:], strict=True)]
    sides = [side for side in (0, 1) if any(wanted[side::2])]
    scratch = [narrow[0].new_empty(tile_size(weights[0]), rows) if side in sides else None for side in (0, 1)]
    for tile, *embeddings, logits in _logits(*narrow, *weights, *biases, softcap):
        call("kl_gradient", narrow[0].dtype, *logits, rows_10N, torch.get_num_threads(), *scratch)
        for side in sides:
            gradient_TN = scratch[side][: len(embeddings[0])]
            if totals[side] is not None:
                add_product(totals[side], gradient_TN, embeddings[side])
            if others[side] is not None:
                others[side][tile] = gradient_TN @ narrow[side].T
            if others[2 + side] is not None:
                others[2 + side][tile] = gradient_TN.sum(1)
    return *(None if total is None else total.to(hidden[0].dtype) for total in totals), *others
