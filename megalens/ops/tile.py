"""What the tile versions share: tiles of the vocabulary, products with them, sums and gradients over them, and when tiles pay.

The matrix products run on torch. What lies between them is one pass of ``cpu/tile.cpp`` on a CPU, and torch operations elsewhere.

Tiles lie transposed, ``[T, B]``: a slice of the embedding then enters the product as it lies in memory (a quarter faster than
``[B, T]`` on MKL), and sums over the vocabulary run down the lanes of a vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalens.ops.checks import OpError
from megalens.ops.native import library

NUM_TILES, MIN_TILE, MAX_TILE = 24, 1024, 8192  # a tile takes a fixed part of the memory of all logits, and calls take a fixed time
MAX_LOGITS = 2**22  # numbers in a tile: with thousands of rows, a tile of the size above would be large
CAST_TILE = 256  # where the tile of the embedding itself must be widened, which costs more memory than its logits


def tile_size(weight_VD: Tensor, rows: int = 1) -> int:
    """Vocabulary rows per tile. Given the ``rows`` of the batch, a tile of logits has at most ``MAX_LOGITS`` numbers."""
    if weight_VD.dtype != product_dtype(weight_VD):
        return CAST_TILE
    size = min(max(weight_VD.shape[0] // NUM_TILES // 16 * 16, MIN_TILE), MAX_TILE)
    return max(min(size, MAX_LOGITS // rows // 16 * 16), CAST_TILE)


def tiles(weight_VD: Tensor, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The vocabulary slice by slice, each with its rows of the embedding in the dtype that is fast, valid until the next is taken."""
    size, dtype = size or tile_size(weight_VD), product_dtype(weight_VD)
    widened_TD = None if weight_VD.dtype == dtype else weight_VD.new_empty(size, weight_VD.shape[1], dtype=dtype)
    for start in range(0, weight_VD.shape[0], size):
        tile = slice(start, min(start + size, weight_VD.shape[0]))
        weight_TD = weight_VD[tile]
        yield tile, weight_TD if widened_TD is None else widened_TD[: len(weight_TD)].copy_(weight_TD)


@torch.compiler.assume_constant_result
def tiles_work() -> bool:
    """Whether this machine can build the tile version; warns once where it cannot."""
    found = library()
    if isinstance(found, OpError):
        warnings.warn(f"{found}; until then the vocabulary ops run their plain reference, slowly and in much memory", stacklevel=2)
    return not isinstance(found, OpError)


def tiles_pay(weight_VD: Tensor) -> bool:
    """Whether tiles are faster than the reference for this embedding: on a CPU with a compiler, from a few tiles on."""
    return weight_VD.device.type == "cpu" and weight_VD.shape[0] >= 4 * MIN_TILE and tiles_work()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to multiply in. A CPU without an instruction for a narrow dtype multiplies in float32: several times faster, and finer."""
    if tensor.device.type != "cpu" or tensor.dtype in (torch.float32, torch.float64):
        return tensor.dtype
    return tensor.dtype if tensor.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else torch.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scalars."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def columns(hidden_BD: Tensor) -> Tensor:
    """Hidden states as the right factor ``[D, B]`` of a product with a tile, in the dtype that is fast."""
    return hidden_BD.to(product_dtype(hidden_BD)).T.contiguous()


def same_weight(one_VD: Tensor, other_VD: Tensor) -> bool:
    """Whether the two embeddings are one tensor, so that one product serves both."""
    return one_VD.data_ptr() == other_VD.data_ptr() and one_VD.shape == other_VD.shape and one_VD.stride() == other_VD.stride()


def tile_pairs(one_VD: Tensor, other_VD: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The vocabulary slice by slice, each with its rows of two embeddings, which may be one: as :func:`tiles` gives them."""
    if same_weight(one_VD, other_VD):
        yield from ((tile, weight_TD, weight_TD) for tile, weight_TD in tiles(one_VD))
    else:
        yield from ((tile, one_TD, other_TD) for (tile, one_TD), (_, other_TD) in zip(tiles(one_VD), tiles(other_VD), strict=True))


def add_product(total_MD: Tensor, left_TM: Tensor, weight_TD: Tensor) -> None:
    """``total += left.T @ weight``, the product in their dtype and the sum in ``total``'s."""
    if total_MD.dtype == left_TM.dtype:
        torch.addmm(total_MD, left_TM.T, weight_TD, out=total_MD)
    elif total_MD.is_cuda:
        total_MD += torch.mm(left_TM.T, weight_TD, out_dtype=total_MD.dtype)
    else:
        total_MD += left_TM.T @ weight_TD


HeadTile = tuple[slice, Tensor, Tensor, Tensor | None]  # what head_tiles gives


def head_tiles(hidden_DN: Tensor, weight_VD: Tensor, bias_V: Tensor | None, size: int | None = None) -> Iterator[HeadTile]:
    """Each tile: its slice, its rows of the embedding, its raw logits ``[T, N]`` (valid until the next is taken) and its bias ``[T]``."""
    size = size or tile_size(weight_VD)
    scratch_TN = hidden_DN.new_empty(size, hidden_DN.shape[1])
    bias_V = None if bias_V is None else bias_V.to(hidden_DN.dtype).contiguous()
    for tile, weight_TD in tiles(weight_VD, size):
        raw_TN = torch.mm(weight_TD, hidden_DN, out=scratch_TN[: len(weight_TD)])
        yield tile, weight_TD, raw_TN, None if bias_V is None else bias_V[tile]


def is_native(tensor: Tensor) -> bool:
    """Whether ``cpu/tile.cpp`` serves this tensor."""
    return tensor.device.type == "cpu"


def capped(raw_TN: Tensor, bias_T: Tensor | None, softcap: float | None) -> Tensor:
    """Logits of a tile in the dtype of scalars, from the raw product."""
    z_TN = raw_TN.to(wide(raw_TN.dtype))
    z_TN = z_TN if bias_T is None else z_TN + bias_T[:, None]
    return softcap * torch.tanh(z_TN / softcap) if softcap else z_TN


def cap_slope(z_TN: Tensor, softcap: float | None) -> Tensor | float:
    """Derivative of the soft-cap, from capped logits."""
    return 1.0 - (z_TN / softcap).square() if softcap else 1.0


def fold(state: Tensor, top: Tensor, sums: Tensor) -> None:
    """Add a tile's sums of ``exp(z - top)`` and its multiples to running ones (online soft-max).

    Args:
        state: float64 ``[..., 1 + S, N]``, changed in place: the running maximum, then S sums relative to it.
        top: the tile's maxima ``[..., N]``.
        sums: the tile's sums ``[..., S, N]``, relative to its maxima.
    """
    base = torch.maximum(top.double(), state[..., 0, :])
    kept, added = (state[..., 0, :] - base).exp()[..., None, :], (top - base).exp()[..., None, :]
    state[..., 1:, :] = state[..., 1:, :] * kept + sums * added
    state[..., 0, :] = base


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, embedding and bias; None where not wanted."""


class HeadGradients:
    """Gradients of a head's hidden states, embedding and bias (those ``wanted``), summed over tiles of the logits' gradient."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wanted: Sequence[bool]):
        for_hidden, for_weight, for_bias = wanted
        self._hidden_ND = hidden_ND
        self._total_ND = torch.zeros_like(hidden_ND, dtype=wide(hidden_ND.dtype)) if for_hidden else None
        self._of_weight_VD = torch.empty_like(weight_VD) if for_weight else None
        self._of_bias_V = torch.empty_like(bias_V) if for_bias and bias_V is not None else None

    def add(self, tile: slice, gradient_TN: Tensor, weight_TD: Tensor) -> None:
        """Add what a tile gives, from the gradient of its logits and its rows of the embedding."""
        if self._total_ND is not None:
            add_product(self._total_ND, gradient_TN, weight_TD)
        if self._of_weight_VD is not None:
            self._of_weight_VD[tile] = gradient_TN @ self._hidden_ND.to(gradient_TN.dtype)
        if self._of_bias_V is not None:
            self._of_bias_V[tile] = gradient_TN.sum(1)

    def found(self) -> Gradients:
        """Gradients of hidden states, embedding and bias, None where not wanted."""
        total_ND = None if self._total_ND is None else self._total_ND.to(self._hidden_ND.dtype)
        return total_ND, self._of_weight_VD, self._of_bias_V
