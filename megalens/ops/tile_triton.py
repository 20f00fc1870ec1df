"""What the Triton versions share: a product of rows with a block of ids, the logits from it, block sizes and switches.

Widths of the products are multiples of 16, as tensor cores want; shorter batches are masked. float32 is multiplied as float32 (no TF32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x): a polynomial near 0, where the quotient would lose digits."""
    a, z = tl.abs(x), x * x
    near = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, x + x * z * near, tl.where(x < 0, -far, far))


@triton.jit
def block(matrix, rows, there, stride, columns, width, WIDEN: tl.constexpr):
    """Rows of a row-major matrix, zero where there is none. WIDEN makes them float32, for the interpreter, which cannot multiply bf16."""
    block = tl.load(
        matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=there[:, None] & (columns < width)[None, :], other=0.0
    )
    return block.to(tl.float32) if WIDEN else block


@triton.jit
def product(
    left, rows, row_there, left_stride, weight, ids, id_there, weight_stride, width,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BB: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``left[rows] @ weight[ids].T``, float32 ``[BB, BV]``."""
    z = tl.zeros((BB, BV), tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        x = block(left, rows, row_there, left_stride, d, width, WIDEN)
        w = block(weight, ids, id_there, weight_stride, d, width, WIDEN)
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
    return z


@triton.jit
def cap_logits(z, bias, ids, in_range, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Bias and soft-cap on a product."""
    if HAS_BIAS:
        z += tl.load(bias + ids, mask=in_range, other=0.0).to(tl.float32)[None, :]
    if HAS_CAP:
        z = softcap * tanh(z / softcap)
    return z


def blocks(rows: int, dtype: torch.dtype, most: int = 32) -> dict:
    """Block sizes and launch settings for so many rows, ``most`` of them a program.

    Registers hold the accumulators and what is made of them, shared memory holds the pipeline.
    """
    size = min(max(triton.next_power_of_2(rows), 16), most)
    narrow = dtype != torch.float32
    return {"BB": size, "BV": 128, "BD": 64 if narrow else 32, "num_warps": 4 if size == 16 else 8, "num_stages": 3}


def switches(bias: bool, softcap: bool, dtype: torch.dtype) -> dict:
    """The kernels' compile-time switches."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return {"HAS_BIAS": bias, "HAS_CAP": softcap, "PRECISION": precision, "WIDEN": triton.knobs.runtime.interpret}
