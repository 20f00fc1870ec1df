"""What the CPU tile versions share: the cut of the vocabulary, the products with a tile, and when tiles pay.

The matrix products run on torch (MKL or oneDNN), everything between them in one pass of ``cpu/tile.cpp``.

Tiles lie transposed, ``[T, B]``: a slice of the embedding then enters the product as it lies in memory (a quarter faster than
``[B, T]`` on MKL), and sums over the vocabulary run down the lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalens.ops.checks import OpError
from megalens.ops.native import library

NUM_TILES, MIN_TILE, MAX_TILE = 24, 1024, 8192  # the memory of a tile is a fixed part of a full row's; so is the cost of calls
CAST_TILE = 256  # where the tile of the embedding itself must be widened, which costs more memory than its logits


def tile_size(weight_VD: Tensor) -> int:
    """Vocabulary rows per tile."""
    if weight_VD.dtype != product_dtype(weight_VD):
        return CAST_TILE
    return min(max(weight_VD.shape[0] // NUM_TILES // 16 * 16, MIN_TILE), MAX_TILE)


def tiles(weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The vocabulary slice by slice, each with its rows of the embedding in the dtype that is fast, good until the next is taken."""
    size, dtype = tile_size(weight_VD), product_dtype(weight_VD)
    widened_TD = None if weight_VD.dtype == dtype else weight_VD.new_empty(size, weight_VD.shape[1], dtype=dtype)
    for start in range(0, weight_VD.shape[0], size):
        tile = slice(start, min(start + size, weight_VD.shape[0]))
        weight_TD = weight_VD[tile]
        yield tile, weight_TD if widened_TD is None else widened_TD[: len(weight_TD)].copy_(weight_TD)


def tiles_pay(weight_VD: Tensor) -> bool:
    """Are tiles faster than the reference for this embedding? On a CPU with a compiler and from a few tiles on."""
    return weight_VD.device.type == "cpu" and weight_VD.shape[0] >= 4 * MIN_TILE and not isinstance(library(), OpError)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to multiply in: on a CPU float32 where it has no instruction for the narrow one (several times faster, and finer)."""
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
    """Are the two embeddings one tensor, so that one product serves both?"""
    return one_VD.data_ptr() == other_VD.data_ptr() and one_VD.shape == other_VD.shape and one_VD.stride() == other_VD.stride()


def add_product(total_MD: Tensor, left_TM: Tensor, weight_TD: Tensor) -> None:
    """``total += left.T @ weight``, the product in their dtype and the sum in ``total``'s."""
    if total_MD.dtype == left_TM.dtype:
        torch.addmm(total_MD, left_TM.T, weight_TD, out=total_MD)
    elif total_MD.is_cuda:
        total_MD += torch.mm(left_TM.T, weight_TD, out_dtype=total_MD.dtype)
    else:
        total_MD += left_TM.T @ weight_TD
