"""The Triton version of :func:`megalens.ops.vocab_log_prob`: products and all that follows them in one kernel per direction.

Forward: a program takes a block of rows through a span of ids, block by block, and keeps running sums (online soft-max); torch folds
those of the spans. Backward: a program computes its logits again and writes their gradient, one chunk of ids at a time, ``[T, N]``;
torch multiplies it with the chunk's rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalens.ops.tile import Gradients, HeadGradients, tile_size
from megalens.ops.tile_triton import blocks, cap_logits, product, switches

SPANS = 256  # of the vocabulary, at the most: enough programs for a few rows, and little to fold for many
ROWS = 64  # of the batch, in one program at the most


@triton.jit
def _sums(
    hidden, weight, bias, token, partial, B, V, D, weight_stride, softcap, span,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BB: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of one block of rows and one span of ids, into ``partial [4, spans, B]``: top, sum e, sum e * (z - top), z of the token or 0."""
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    row_there = rows < B
    chosen = tl.load(token + rows, mask=row_there, other=-1)
    top = tl.full((BB,), -1e30, tl.float32)  # an infinity would make NaN of the first block's fold
    mass = tl.zeros((BB,), tl.float32)
    moment = tl.zeros((BB,), tl.float32)
    z_token = tl.zeros((BB,), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, V), BV):
        ids = start + tl.arange(0, BV)
        id_there = ids < V
        z = product(hidden, rows, row_there, D, weight, ids, id_there, weight_stride, D, PRECISION, WIDEN, BB, BV, BD)
        z = cap_logits(z, bias, ids, id_there, softcap, HAS_BIAS, HAS_CAP)
        fresh = tl.maximum(top, tl.max(tl.where(id_there[None, :], z, float("-inf")), 1))
        kept = tl.exp(top - fresh)
        below = z - fresh[:, None]
        e = tl.where(id_there[None, :], tl.exp(below), 0.0)
        moment = kept * (moment + mass * (top - fresh)) + tl.sum(e * below, 1)
        mass = kept * mass + tl.sum(e, 1)
        z_token += tl.sum(tl.where(ids.to(tl.int64)[None, :] == chosen[:, None], z, 0.0), 1)
        top = fresh
    at = partial + tl.program_id(1) * B + rows
    step = tl.num_programs(1) * B
    tl.store(at, top, mask=row_there)
    tl.store(at + step, mass, mask=row_there)
    tl.store(at + 2 * step, moment, mask=row_there)
    tl.store(at + 3 * step, z_token, mask=row_there)


@triton.jit
def _gradient(
    hidden, weight, bias, per_row, token, gradient, B, first_id, end_id, D, weight_stride, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BB: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The logits' gradient of one block of ids and rows, into ``gradient [T, B]``.

    ``per_row [4, B]``: lse, entropy, and the gradients of log-probability and entropy.
    """
    rows = tl.program_id(0) * BB + tl.arange(0, BB)
    ids = first_id + tl.program_id(1) * BV + tl.arange(0, BV)
    row_there, id_there = rows < B, ids < end_id
    z = product(hidden, rows, row_there, D, weight, ids, id_there, weight_stride, D, PRECISION, WIDEN, BB, BV, BD)
    z = cap_logits(z, bias, ids, id_there, softcap, HAS_BIAS, HAS_CAP)
    lse = tl.load(per_row + rows, mask=row_there, other=0.0)
    entropy = tl.load(per_row + B + rows, mask=row_there, other=0.0)
    grad_log_prob = tl.load(per_row + 2 * B + rows, mask=row_there, other=0.0)
    grad_entropy = tl.load(per_row + 3 * B + rows, mask=row_there, other=0.0)
    chosen = tl.load(token + rows, mask=row_there, other=-1)
    log_p = z - lse[:, None]
    found = -tl.exp(log_p) * (grad_log_prob[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None]))
    found += tl.where(ids.to(tl.int64)[None, :] == chosen[:, None], grad_log_prob[:, None], 0.0)
    if HAS_CAP:
        found *= 1.0 - (z / softcap) * (z / softcap)
    at = gradient + (ids - first_id).to(tl.int64)[None, :] * B + rows[:, None]
    tl.store(at, found.to(gradient.dtype.element_ty), mask=row_there[:, None] & id_there[None, :])


KERNELS = {"sums": _sums, "gradient": _gradient}


def forward(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, bias_V: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`megalens.ops.log_prob_tile.forward`."""
    (N, D), V = hidden_ND.shape, weight_VD.shape[0]
    hidden_ND, sizes = hidden_ND.contiguous(), blocks(N, hidden_ND.dtype, ROWS)
    span = triton.cdiv(triton.cdiv(V, sizes["BV"]), SPANS) * sizes["BV"]
    grid = triton.cdiv(N, sizes["BB"]), triton.cdiv(V, span)
    partial = hidden_ND.new_empty(4, grid[1], N, dtype=torch.float32)
    tensors = hidden_ND, weight_VD, hidden_ND if bias_V is None else bias_V.contiguous(), ids_N.contiguous(), partial
    on = switches(bias_V is not None, softcap is not None, hidden_ND.dtype)
    _sums[grid](*tensors, N, V, D, weight_VD.stride(0), softcap or 1.0, span, **on, **sizes)
    top, mass, moment, z_token = partial
    top_N = top.amax(0)
    scale = (top - top_N).exp()
    mass_N = (mass * scale).sum(0)
    lse_N = top_N + mass_N.log()
    entropy_N = mass_N.log() - (scale * (moment + mass * (top - top_N))).sum(0) / mass_N
    z_token_N = torch.where((ids_N >= 0) & (ids_N < V), z_token.sum(0), torch.nan)
    return z_token_N - lse_N, entropy_N, lse_N


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
    """As :func:`megalens.ops.log_prob_tile.backward`."""
    (N, D), V, (entropy_N, lse_N) = hidden_ND.shape, weight_VD.shape[0], found
    hidden_ND, sizes = hidden_ND.contiguous(), blocks(N, hidden_ND.dtype, ROWS)
    chunk = max(tile_size(weight_VD, N) // sizes["BV"], 1) * sizes["BV"]
    scratch_TN = hidden_ND.new_empty(chunk, N)
    rows_4N = torch.stack([lse_N, entropy_N, *grads])
    tensors = hidden_ND, weight_VD, hidden_ND if bias_V is None else bias_V.contiguous(), rows_4N, ids_N.contiguous(), scratch_TN
    on = switches(bias_V is not None, softcap is not None, hidden_ND.dtype)
    gradients = HeadGradients(hidden_ND, weight_VD, bias_V, wanted)
    for start in range(0, V, chunk):
        tile = slice(start, min(start + chunk, V))
        grid = triton.cdiv(N, sizes["BB"]), triton.cdiv(tile.stop - start, sizes["BV"])
        _gradient[grid](*tensors, N, start, tile.stop, D, weight_VD.stride(0), softcap or 1.0, **on, **sizes)
        gradients.add(tile, scratch_TN[: tile.stop - start], weight_VD[tile])
    return gradients.found()
