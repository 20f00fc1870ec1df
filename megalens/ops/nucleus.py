"""Nucleus (top-p) sampling (Holtzman et al., 2020), and how much of a distribution lies in a nucleus, without whole rows of logits.

The nucleus of a row is the smallest set of its likeliest tokens that holds at least ``top_p`` of the probability; equal logits are in it
together. A training needs three numbers of a draw: the token, its log-probability among the nucleus, and where the nucleus ended.

``tile`` goes over the vocabulary tile by tile, on any device. The edge of the nucleus is found exactly, by radix selection over the bits of
the float32 logits: one pass for the log-sum-exp, three for the edge, one for the draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalens.ops.checks import OpError, cast_under_autocast, check_head, check_impl, check_softcap, without_autocast
from megalens.ops.logits import head_logits
from megalens.ops.noise import gumbel
from megalens.ops.tile import HeadGradients, cap_slope, capped, columns, fold, product_dtype, tile_size, tiles, wide

IMPLEMENTATIONS = ("reference", "tile")
DIGITS = (11, 11, 10)  # bits of a logit that each pass of the selection looks at
ROWS = 256  # at once: the selection has 2^11 sums for each


class NucleusDraw(NamedTuple):
    """What :func:`sample_nucleus` gives for each of N rows; scalars are float32 (float64 for float64 inputs)."""

    ids: Tensor  # int64 [N]: the drawn token
    log_prob: Tensor  # [N]: of the token among the nucleus
    floor: Tensor  # [N]: log-probability among all tokens halfway between the nucleus' last token and the next; -inf: all are in it


def sample_nucleus(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    top_p: float,
    keys_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> NucleusDraw:
    """Draw a token per row from its nucleus under the softmax of ``hidden @ weight.T + bias`` (soft-capped if asked).

    The draw is the arg-max of ``logits + gumbel`` among the nucleus: a pure function of the keys.

    Args:
        hidden_ND: hidden states, one row per draw.
        weight_VD: output embedding.
        top_p: share of the probability that the nucleus holds at least, in (0, 1].
        keys_N: int64, from :func:`megalens.ops.noise_keys`.
        bias_V: bias of the head.
        softcap: the cap of the logits (Gemma), or None.
        impl: ``reference`` (whole rows of logits, sorted) or ``tile``; ``auto`` is ``tile``.

    Raises:
        OpError: an argument is wrong.
    """
    if not 0 < top_p <= 1:
        raise OpError(f"sample_nucleus: top_p must lie in (0, 1], not {top_p}")
    hidden_ND = _checked("sample_nucleus", hidden_ND, weight_VD, bias_V, softcap, impl)
    with torch.no_grad(), without_autocast(hidden_ND):
        if impl == "reference":
            return _draw_reference(hidden_ND, weight_VD, top_p, keys_N, bias_V, softcap)
        parts = zip(hidden_ND.split(ROWS), keys_N.split(ROWS), strict=True)
        drawn = [_draw_tiles(hidden, weight_VD, top_p, keys, bias_V, softcap) for hidden, keys in parts]
        return NucleusDraw(*(torch.cat(field) for field in zip(*drawn, strict=True)))


def nucleus_log_mass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    floor_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log of the probability of all tokens whose log-probability is at least ``floor``, ``[N]``, differentiable.

    ``log p(token) - nucleus_log_mass`` is the log-probability of a token among the nucleus. Which tokens are in it is a constant.

    Args:
        floor_N: from :func:`sample_nucleus`; the others are as there.

    Raises:
        OpError: an argument is wrong.
    """
    hidden_ND = _checked("nucleus_log_mass", hidden_ND, weight_VD, bias_V, softcap, impl)
    with without_autocast(hidden_ND):
        if impl == "reference":
            log_p_NV = head_logits(hidden_ND, weight_VD, bias_V, softcap).log_softmax(-1)
            return log_p_NV.masked_fill(log_p_NV < floor_N[:, None], -torch.inf).logsumexp(-1)
        return _LogMass.apply(hidden_ND, weight_VD, bias_V, floor_N, softcap)


def _checked(op: str, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, impl: str) -> Tensor:
    """Hidden states in the weight's dtype; refuse what is wrong."""
    hidden_ND = cast_under_autocast(hidden_ND, weight_VD)
    check_head(op, "", hidden_ND, weight_VD, bias_V)
    check_softcap(op, softcap)
    check_impl(op, impl, IMPLEMENTATIONS)
    return hidden_ND


# ----------------------------------------------------------------------------------------------------------- reference


def _draw_reference(hidden_ND, weight_VD, top_p, keys_N, bias_V, softcap) -> NucleusDraw:
    """Sort whole rows of logits: what the tiles must equal."""
    logits_NV = head_logits(hidden_ND, weight_VD, bias_V, softcap)
    log_p_NV = logits_NV.log_softmax(-1)
    sorted_NV = log_p_NV.sort(-1, descending=True).values
    before_NV = sorted_NV.double().exp().cumsum(-1) - sorted_NV.double().exp()
    edge_N1 = sorted_NV.masked_fill(before_NV >= top_p, torch.inf).amin(-1, keepdim=True)
    inside_NV = log_p_NV >= edge_N1
    noisy_NV = (logits_NV + gumbel(keys_N, logits_NV.shape[1])).masked_fill(~inside_NV, -torch.inf)
    ids_N = noisy_NV.argmax(-1)
    mass_N = log_p_NV.masked_fill(~inside_NV, -torch.inf).logsumexp(-1)
    next_N = log_p_NV.masked_fill(inside_NV, -torch.inf).amax(-1)
    return NucleusDraw(ids_N, log_p_NV.gather(-1, ids_N[:, None])[:, 0] - mass_N, (edge_N1[:, 0] + next_N) / 2)


# --------------------------------------------------------------------------------------------------------------- tiles


def _logit_tiles(hidden_ND, weight_VD, bias_V, softcap) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each tile: its slice, its rows of the embedding, its logits ``[T, N]`` in the dtype of scalars; the same bits in every pass."""
    hidden_DN, size = columns(hidden_ND), tile_size(weight_VD, 4 * len(hidden_ND))
    dtype = wide(hidden_DN.dtype)
    for tile, weight_TD in tiles(weight_VD, size):
        narrow = hidden_DN.is_cuda and hidden_DN.dtype != dtype
        raw_TN = torch.mm(weight_TD, hidden_DN, out_dtype=dtype) if narrow else torch.mm(weight_TD, hidden_DN)
        yield tile, weight_TD, capped(raw_TN, None if bias_V is None else bias_V[tile].to(raw_TN.dtype), softcap)


def _log_sum_exp(hidden_ND, weight_VD, bias_V, softcap) -> Tensor:
    """Of all logits of a row, float64 ``[N]``."""
    state_2N = torch.zeros(2, len(hidden_ND), dtype=torch.float64, device=hidden_ND.device)
    state_2N[0] = -torch.inf
    for _, _, z_TN in _logit_tiles(hidden_ND, weight_VD, bias_V, softcap):
        top_N = z_TN.amax(0)
        fold(state_2N, top_N, (z_TN - top_N).exp().sum(0)[None])
    return state_2N[0] + state_2N[1].log()


def _order(z_TN: Tensor) -> Tensor:
    """Integers from 0 to 2^32 - 1 in the order of float32 logits."""
    bits_TN = z_TN.float().view(torch.int32)
    return (bits_TN ^ ((bits_TN >> 31) & 0x7FFFFFFF)).long() + 2**31


def _edge(hidden_ND, weight_VD, bias_V, softcap, top_p: float, lse_N: Tensor) -> Tensor:
    """The order of the smallest logit in each nucleus, int64 ``[N]``: digit by digit, from the top."""
    edge_N = torch.zeros_like(lse_N, dtype=torch.int64)
    above_N, left = torch.zeros_like(lse_N), sum(DIGITS)
    for digits in DIGITS:
        left -= digits
        mass_KN = torch.zeros(2**digits, len(lse_N), dtype=torch.float64, device=lse_N.device)
        for _, _, z_TN in _logit_tiles(hidden_ND, weight_VD, bias_V, softcap):
            order_TN = _order(z_TN) >> left
            p_TN = (z_TN - lse_N).exp().masked_fill_((order_TN >> digits) != edge_N, 0.0)
            mass_KN.scatter_add_(0, order_TN & (2**digits - 1), p_TN)
        reached_KN = above_N + mass_KN.flip(0).cumsum(0)
        enough_KN = reached_KN >= top_p
        last_N = 2**digits - 1 - (mass_KN > 0).to(torch.int8).argmax(0)  # where rounding leaves the sum below top_p
        place_N = torch.where(enough_KN.any(0), enough_KN.to(torch.int8).argmax(0), last_N)
        digit_N = 2**digits - 1 - place_N
        above_N = reached_KN.gather(0, place_N[None])[0] - mass_KN.gather(0, digit_N[None])[0]
        edge_N = (edge_N << digits) | digit_N
    return edge_N


def _draw_tiles(hidden_ND, weight_VD, top_p, keys_N, bias_V, softcap) -> NucleusDraw:
    """As :func:`_draw_reference`, tile by tile."""
    lse_N = _log_sum_exp(hidden_ND, weight_VD, bias_V, softcap)
    edge_N = _edge(hidden_ND, weight_VD, bias_V, softcap, top_p, lse_N)
    mass_N, ids_N = torch.zeros_like(lse_N), torch.zeros_like(edge_N)
    best_N, z_token_N, next_N = (torch.full_like(lse_N, -torch.inf) for _ in range(3))
    last_N = torch.full_like(lse_N, torch.inf)
    for tile, _, z_TN in _logit_tiles(hidden_ND, weight_VD, bias_V, softcap):
        inside_TN = _order(z_TN) >= edge_N
        mass_N += (z_TN - lse_N).exp().masked_fill(~inside_TN, 0.0).sum(0)
        next_N = torch.maximum(next_N, z_TN.masked_fill(inside_TN, -torch.inf).amax(0).double())
        last_N = torch.minimum(last_N, z_TN.masked_fill(~inside_TN, torch.inf).amin(0).double())
        noisy_TN = (z_TN + gumbel(keys_N, len(z_TN), tile.start).T).masked_fill(~inside_TN, -torch.inf)
        top_N, at_N = noisy_TN.max(0)
        better_N = top_N > best_N
        best_N = torch.where(better_N, top_N.double(), best_N)
        ids_N = torch.where(better_N, at_N + tile.start, ids_N)
        z_token_N = torch.where(better_N, z_TN.gather(0, at_N[None])[0].double(), z_token_N)
    dtype = wide(hidden_ND.dtype)
    return NucleusDraw(ids_N, (z_token_N - lse_N - mass_N.log()).to(dtype), ((last_N + next_N) / 2 - lse_N).to(dtype))


class _LogMass(torch.autograd.Function):
    """:func:`nucleus_log_mass` tile by tile: one pass for the log-sum-exp, one for the mass; one more in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, floor_N: Tensor, softcap: float | None) -> Tensor:
        lse_N = _log_sum_exp(hidden_ND, weight_VD, bias_V, softcap)
        mass_N = torch.zeros_like(lse_N)
        for _, _, z_TN in _logit_tiles(hidden_ND, weight_VD, bias_V, softcap):
            log_p_TN = z_TN - lse_N
            mass_N += log_p_TN.exp().masked_fill(log_p_TN < floor_N, 0.0).sum(0)
        ctx.softcap, log_mass_N = softcap, mass_N.log()
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, floor_N, lse_N, log_mass_N)
        return log_mass_N.to(wide(hidden_ND.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden_ND, weight_VD, bias_V, floor_N, lse_N, log_mass_N = ctx.saved_tensors
        gradients = HeadGradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[:3])
        for tile, weight_TD, z_TN in _logit_tiles(hidden_ND, weight_VD, bias_V, ctx.softcap):
            log_p_TN = z_TN - lse_N
            among_TN = (log_p_TN - log_mass_N).exp().masked_fill(log_p_TN < floor_N, 0.0)
            of_logits_TN = grads[0] * (among_TN - log_p_TN.exp()) * cap_slope(z_TN, ctx.softcap)
            gradients.add(tile, of_logits_TN.to(product_dtype(hidden_ND)), weight_TD)
        return *gradients.found(), None, None
