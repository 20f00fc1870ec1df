"""The Triton version of :func:`megalens.ops.gumbel_embed`: products and all that follows them in one kernel per direction.

Forward: one program per block of ids and rows computes its logits and their statistics, and torch folds these; ``[B, V]`` is never
written. Backward: a program computes both products (logits, and gradient times input embedding) and writes the two factors of
one chunk of ids, ``[T, 2B]``. Torch multiplies them with the chunk's rows; the docstring of gumbel_tile.py has the algebra.

The noise is noise.py's: the same integer hash, then the same polynomials for its logarithms as cpu/lanes.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalens.ops.gumbel_tile import assemble
from megalens.ops.noise import split_keys
from megalens.ops.tile import Gradients, same_weight
from megalens.ops.tile_triton import block, blocks, cap_logits, product, switches

CHUNKS = 16  # of the vocabulary, whose factors exist at one time in the backward


@triton.jit
def _log(x, near, use_near: tl.constexpr):
    """log(x) to about an ulp; where 1/sqrt(2) <= x <= 1 and ``use_near``, log(1 + near)."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = bits >> 23
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    if use_near:
        m = tl.where(exponent == 0, near, m)
    s = 7.0376836292e-2 * m - 1.1514610310e-1
    s = s * m + 1.1676998740e-1
    s = s * m - 1.2420140846e-1
    s = s * m + 1.4249322787e-1
    s = s * m - 1.6668057665e-1
    s = s * m + 2.0000714765e-1
    s = s * m - 2.4999993993e-1
    s = s * m + 3.3333331174e-1
    return exponent.to(tl.float32) * 0.693147180559945 + (m + m * m * (m * s - 0.5))


@triton.jit
def _gumbel(low, high, ids):
    x = ids.to(tl.uint32)[None, :] + low.to(tl.uint32, bitcast=True)[:, None]
    x = (x ^ (x >> 17)) * tl.full((), 0xED5AD4BB, tl.uint32) + high.to(tl.uint32, bitcast=True)[:, None]
    x = (x ^ (x >> 11)) * tl.full((), 0xAC4C1B51, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x31848BAB, tl.uint32)
    x = (x ^ (x >> 14)) & tl.full((), 0x7FFFFFFF, tl.uint32)
    w = (x.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 4.656612873077393e-10
    w = tl.minimum(w, 0.99999994)
    return -_log(-_log(1.0 - w, -w, True), w, False)


@triton.jit
def _statistics(
    hidden, weight, bias, keys, partial, best, B, V, D, weight_stride, softcap, noise, sharpness,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BB: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of one block of ids and rows, into ``partial [6, blocks, B]``: top, sum e, sum e * (z - top), noisy top, noisy sum e, z of best."""
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    ids = tl.program_id(1) * BV + tl.arange(0, BV)
    row_there, id_there = rows < B, ids < V
    z = product(hidden, rows, row_there, D, weight, ids, id_there, weight_stride, D, PRECISION, WIDEN, BB, BV, BD)
    z = cap_logits(z, bias, ids, id_there, softcap, HAS_BIAS, HAS_CAP)
    low = tl.load(keys + rows, mask=row_there, other=0)
    high = tl.load(keys + B + rows, mask=row_there, other=0)
    noisy = tl.where(id_there[None, :], z + noise * _gumbel(low, high, ids), float("-inf"))
    top = tl.max(tl.where(id_there[None, :], z, float("-inf")), 1)
    e = tl.where(id_there[None, :], tl.exp(z - top[:, None]), 0.0)
    noisy_top = tl.max(noisy, 1)
    first = tl.min(tl.where(noisy == noisy_top[:, None], ids[None, :], V - 1), 1)
    at = partial + tl.program_id(1) * B + rows
    step = tl.num_programs(1) * B
    tl.store(at, top, mask=row_there)
    tl.store(at + step, tl.sum(e, 1), mask=row_there)
    tl.store(at + 2 * step, tl.sum(e * (z - top[:, None]), 1), mask=row_there)
    tl.store(at + 3 * step, noisy_top, mask=row_there)
    tl.store(at + 4 * step, tl.sum(tl.exp((noisy - noisy_top[:, None]) * sharpness), 1), mask=row_there)
    tl.store(at + 5 * step, tl.sum(tl.where(ids[None, :] == first[:, None], z, 0.0), 1), mask=row_there)
    tl.store(best + tl.program_id(1) * B + rows, first, mask=row_there)


@triton.jit
def _factors(
    hidden, grad, out_weight, in_weight, bias, keys, per_row, token, factors, mean, B, first_id, end_id, D, E,
    out_stride, in_stride, softcap, noise, sharpness,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TIED: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, BB: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of one block of ids and rows: both factors, into ``factors [T, 2, B]``, and its part of the mean of q, into ``mean [blocks, B]``.

    ``per_row [7, B]``: q of the token, lse, noisy lse, entropy, and the gradients of log_prob, lse and entropy.
    """
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    ids = first_id + tl.program_id(1) * BV + tl.arange(0, BV)
    row_there, id_there = rows < B, ids < end_id
    if TIED:  # both products from one reading of the embedding
        z = tl.zeros((BB, BV), tl.float32)
        q = tl.zeros((BB, BV), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            w = block(out_weight, ids, id_there, out_stride, d, D, WIDEN)
            z = tl.dot(block(hidden, rows, row_there, D, d, D, WIDEN), tl.trans(w), z, input_precision=PRECISION)
            q = tl.dot(block(grad, rows, row_there, D, d, D, WIDEN), tl.trans(w), q, input_precision=PRECISION)
    else:
        z = product(hidden, rows, row_there, D, out_weight, ids, id_there, out_stride, D, PRECISION, WIDEN, BB, BV, BD)
        q = product(grad, rows, row_there, E, in_weight, ids, id_there, in_stride, E, PRECISION, WIDEN, BB, BV, BD)
    z = cap_logits(z, bias, ids, id_there, softcap, HAS_BIAS, HAS_CAP)
    low = tl.load(keys + rows, mask=row_there, other=0)
    high = tl.load(keys + B + rows, mask=row_there, other=0)
    q_token = tl.load(per_row + rows, mask=row_there, other=0.0)
    lse = tl.load(per_row + B + rows, mask=row_there, other=0.0)
    noisy_lse = tl.load(per_row + 2 * B + rows, mask=row_there, other=0.0)
    entropy = tl.load(per_row + 3 * B + rows, mask=row_there, other=0.0)
    grad_log_prob = tl.load(per_row + 4 * B + rows, mask=row_there, other=0.0)
    grad_lse = tl.load(per_row + 5 * B + rows, mask=row_there, other=0.0)
    grad_entropy = tl.load(per_row + 6 * B + rows, mask=row_there, other=0.0)
    chosen = tl.load(token + rows, mask=row_there, other=-1)
    p = tl.exp((z + noise * _gumbel(low, high, ids)) * sharpness - noisy_lse[:, None])
    pq = tl.where(id_there[None, :], p * (q - q_token[:, None]), 0.0)
    log_plain = z - lse[:, None]
    weight_of_plain = (grad_lse - grad_log_prob)[:, None] - grad_entropy[:, None] * (log_plain + entropy[:, None])
    gradient = pq * sharpness + tl.exp(log_plain) * weight_of_plain
    gradient += tl.where(ids.to(tl.int64)[None, :] == chosen[:, None], grad_log_prob[:, None], 0.0)
    per_mean = p * sharpness
    if HAS_CAP:
        slope = 1.0 - (z / softcap) * (z / softcap)
        gradient *= slope
        per_mean *= slope
    at = factors + (ids - first_id).to(tl.int64)[None, :] * (2 * B) + rows[:, None]
    there = row_there[:, None] & id_there[None, :]
    tl.store(at, gradient.to(factors.dtype.element_ty), mask=there)
    tl.store(at + B, per_mean.to(factors.dtype.element_ty), mask=there)
    tl.store(mean + tl.program_id(1) * B + rows, tl.sum(pq, 1), mask=row_there)


KERNELS = {"statistics": _statistics, "factors": _factors}


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
    (B, D), V = hidden_BD.shape, out_weight_VD.shape[0]
    hidden_BD, sizes = hidden_BD.contiguous(), blocks(B, hidden_BD.dtype)
    grid = triton.cdiv(B, sizes["BB"]), triton.cdiv(V, sizes["BV"])
    partial = hidden_BD.new_empty(6, grid[1], B, dtype=torch.float32)
    best = torch.empty(grid[1], B, dtype=torch.int32, device=hidden_BD.device)
    tensors = hidden_BD, out_weight_VD, hidden_BD if bias_V is None else bias_V.contiguous(), split_keys(keys_B), partial, best
    numbers = B, V, D, out_weight_VD.stride(0), softcap or 1.0, noise, 1 / tau
    _statistics[grid](*tensors, *numbers, **switches(bias_V is not None, softcap is not None, hidden_BD.dtype), **sizes)
    top, mass, moment, noisy_top, noisy_mass, z_best = partial
    top_B, (noisy_top_B, winner_B) = top.amax(0), noisy_top.max(0)
    scale = (top - top_B).exp()
    mass_B = (mass * scale).sum(0)
    lse_B = top_B + mass_B.log()
    entropy_B = mass_B.log() - (scale * (moment + mass * (top - top_B))).sum(0) / mass_B
    noisy_lse_B = noisy_top_B / tau + (noisy_mass * ((noisy_top - noisy_top_B) / tau).exp()).sum(0).log()
    ids_B, z_best_B = best.gather(0, winner_B[None])[0].long(), z_best.gather(0, winner_B[None])[0]
    return ids_B, z_best_B - lse_B, lse_B, entropy_B, noisy_lse_B


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
    """As :func:`megalens.ops.gumbel_tile.backward`."""
    (grad_BD, *grad_rows), (ids_B, embeds_BD, lse_B, entropy_B, noisy_lse_B) = grads, saved
    (B, D), V = hidden_BD.shape, out_weight_VD.shape[0]
    hidden_BD, grad_BD, sizes = hidden_BD.contiguous(), grad_BD.contiguous(), blocks(B, hidden_BD.dtype)
    rows_7B = torch.stack([(grad_BD.float() * embeds_BD.float()).sum(-1), lse_B, noisy_lse_B, entropy_B, *grad_rows])
    chunk = triton.cdiv(triton.cdiv(V, CHUNKS), sizes["BV"]) * sizes["BV"]
    scratch_TM = hidden_BD.new_empty(chunk, 2 * B)
    partial = hidden_BD.new_empty(chunk // sizes["BV"], B, dtype=torch.float32)
    tensors = hidden_BD, grad_BD, out_weight_VD, in_weight_VD, hidden_BD if bias_V is None else bias_V.contiguous(), split_keys(keys_B)
    on = switches(bias_V is not None, softcap is not None, hidden_BD.dtype) | {"TIED": same_weight(out_weight_VD, in_weight_VD)}

    def factors(mean_B: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, V, chunk):
            tile = slice(start, min(start + chunk, V))
            grid = triton.cdiv(B, sizes["BB"]), triton.cdiv(tile.stop - start, sizes["BV"])
            numbers = (
                B,
                start,
                tile.stop,
                D,
                in_weight_VD.shape[1],
                out_weight_VD.stride(0),
                in_weight_VD.stride(0),
                softcap or 1.0,
                noise,
                1 / tau,
            )
            _factors[grid](*tensors, rows_7B, ids_B, scratch_TM, partial, *numbers, **on, **sizes)
            mean_B += partial[: grid[1]].sum(0)
            yield tile, out_weight_VD[tile], scratch_TM[: tile.stop - start]

    return assemble(factors, hidden_BD, out_weight_VD, bias_V, lse_B, weights)
