"""Gumbel noise as a pure function of (seed, optimizer step, sample id, draw, token index, vocabulary id).

The draw tells apart the rollouts of one sample. Draw 0 is the noise of a training step that decodes each sample once.

Counter-based: there is no generator and no state. The same sample draws the same noise on any rank, engine or device, with or
without recomputation, and a tile of the vocabulary can draw its own part again. The arithmetic is in integers up to the uniform,
which is float32 by definition; only the two logarithms are left to the device's rounding.

The key of a row is SplitMix64's finaliser (Steele et al., 2014) over the five coordinates; the hash of (key, id) is the
32-bit "triple32" of C. Wellons' hash-prospector with the key's halves added before its first and second round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalens.ops.checks import OpError

_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
HASH_1, HASH_2, HASH_3 = -0x12A52B45, -0x53B3E4AF, 0x31848BAB  # of triple32, as signed 32-bit numbers


def _spread(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of the 64-bit integers that spreads every bit, and leaves 0 at 0."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step: one more counted on, then spread."""
    return _spread(x + _GOLDEN)


def noise_keys(seed: int, update: int, sample_id_B: Tensor, token: int, draw: int | Tensor = 0) -> Tensor:
    """One noise key per row, a 64-bit hash of the row's five coordinates.

    Args:
        seed: the training's seed.
        update: the optimizer step.
        sample_id_B: the samples' global ids, int64 ``[B]``.
        token: the index of the token in the explanation.
        draw: which rollout of its sample a row is: one number for all rows, or int64 ``[B]``.

    Returns:
        int64 ``[B]`` on the device of ``sample_id_B``. Within one (seed, update, token), distinct ids of one draw give distinct keys,
        and so do distinct draws of one id.

    Raises:
        OpError: ``sample_id_B`` is no int64 vector, or ``draw`` neither a number nor one.
    """
    if sample_id_B.dtype != torch.int64 or sample_id_B.dim() != 1:
        raise OpError(f"noise_keys: sample_id_B must be int64 [B], not {sample_id_B.dtype} {list(sample_id_B.shape)}")
    if not isinstance(draw, Tensor):
        draw = torch.full_like(sample_id_B, draw)
    elif draw.dtype != torch.int64 or draw.shape != sample_id_B.shape:
        raise OpError(f"noise_keys: draw must be a number or int64 [{len(sample_id_B)}], not {draw.dtype} {list(draw.shape)}")
    where = _mix(torch.full_like(sample_id_B, seed))
    where = _mix(where ^ update)
    where = _mix(where ^ token)
    return _mix(_mix(sample_id_B) ^ where ^ _spread(draw))


def split_keys(keys_B: Tensor) -> Tensor:
    """The keys' low and high 32 bits, int32 ``[2, B]``."""
    low_B = ((keys_B & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    return torch.stack([low_B, keys_B >> 32]).to(torch.int32)


def uniform(halves_2B: Tensor, ids: Tensor) -> Tensor:
    """Uniform float32 in the open (0, 1), fine-grained near 0; halves from :func:`split_keys`, int32 ``ids`` broadcast against ``[B]``."""
    low_B, high_B = halves_2B
    x = ids + low_B
    x = (x ^ ((x >> 17) & 0x7FFF)) * HASH_1 + high_B
    x = (x ^ ((x >> 11) & 0x1FFFFF)) * HASH_2
    x = (x ^ ((x >> 15) & 0x1FFFF)) * HASH_3
    x = (x ^ ((x >> 14) & 0x3FFFF)) & 0x7FFFFFFF
    return ((x.to(torch.float32) + 0.5) * 2.0**-31).clamp(max=1.0 - 2.0**-24)


def gumbel(keys_B: Tensor, num_ids: int, first_id: int = 0) -> Tensor:
    """Standard Gumbel noise, float32 ``[B, V]``: ``-log(-log(1 - w))`` for w from :func:`uniform`, so the upper tail is fine-grained.

    V ids from ``first_id`` on: a tile of the vocabulary draws its own part.
    """
    ids_V1 = torch.arange(first_id, first_id + num_ids, dtype=torch.int32, device=keys_B.device)[:, None]
    return -(-torch.log1p(-uniform(split_keys(keys_B), ids_V1))).log().T
