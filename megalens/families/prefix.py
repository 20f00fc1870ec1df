"""What the blocks above a layer hold of the tokens before a position: read once, so that one token can go through them again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM


@dataclass
class Prefix:
    """Of each row, what blocks ``first ..`` keep of the tokens before its P.

    Args:
        key_positions_BK: the position of each key in :attr:`cache`; negative where it is hidden from P.
    """

    first: int
    cache: KVCache
    position_B: Tensor
    key_positions_BK: Tensor

    def go_on(self, lm: CausalLM, hidden_BD: Tensor) -> Tensor:
        """The residual stream ``[B, D]`` after the last block at P, of what enters block :attr:`first` there; differentiable.

        Exact: causal blocks keep everything before P as it was, so one token goes through them, on what they kept.
        """
        position_B1 = self.position_B[:, None]
        key_positions = torch.cat([self.key_positions_BK, position_B1], dim=1)
        return lm.run(hidden_BD[:, None], self.first, len(lm.blocks), position_B1, key_positions, self.cache.fork())[:, 0]

    def repeated(self, times: int) -> Prefix:
        """Each row so many times, side by side. What is kept of a row is kept once."""
        position_B, key_positions_BK = (x.repeat_interleave(times, 0) for x in (self.position_B, self.key_positions_BK))
        return replace(self, position_B=position_B, key_positions_BK=key_positions_BK)


def read_prefix(lm: CausalLM, hidden_SCD: Tensor, first: int, position_B: Tensor, rows_B: Tensor | None = None) -> tuple[Tensor, Prefix]:
    """Run contexts through the blocks from ``first`` on.

    Args:
        hidden_SCD: the residual stream before block ``first`` of right-padded contexts.
        position_B: the position P of each row.
        rows_B: the context of each row; None: its own.

    Returns:
        The residual stream ``[B, D]`` after the last block at P, and what was kept.
    """
    if not lm.hides_keys(first, len(lm.blocks)):
        return _read_to_its_end(lm, hidden_SCD, first, position_B, rows_B)
    positions = torch.arange(hidden_SCD.shape[1], device=hidden_SCD.device)[None]
    cache = KVCache()
    out_SCD = lm.run(hidden_SCD, first, len(lm.blocks), positions, cache=cache)
    each_B = torch.arange(len(position_B), device=position_B.device) if rows_B is None else rows_B
    prefix = Prefix(first, cache if rows_B is None else cache.rows(rows_B), position_B, _before(positions, position_B))
    return out_SCD[each_B, position_B], prefix


def _read_to_its_end(lm: CausalLM, hidden_SCD: Tensor, first: int, position_B: Tensor, rows_B: Tensor | None) -> tuple[Tensor, Prefix]:
    """:func:`read_prefix` where what is kept must be of the tokens before P and of no others: each row ends there, padding first."""
    each_B = torch.arange(len(position_B), device=position_B.device) if rows_B is None else rows_B
    length = hidden_SCD.shape[1] - 1 if position_B.is_meta else int(position_B.max())
    place = torch.arange(length, device=position_B.device)[None] - length
    key_positions_BK = (position_B[:, None] + place).clamp_min(-1)
    cache = KVCache()
    if length:
        at_BK = key_positions_BK.clamp_min(0)
        before_BKD = hidden_SCD[each_B[:, None], at_BK] * (key_positions_BK >= 0)[..., None]
        lm.run(before_BKD, first, len(lm.blocks), at_BK, key_positions_BK, cache)
    prefix = Prefix(first, cache, position_B, key_positions_BK)
    return prefix.go_on(lm, hidden_SCD[each_B, position_B]), prefix


def _before(positions: Tensor, position_B: Tensor) -> Tensor:
    """``[B, K]``: positions before a row's own, -1 for the others."""
    return torch.where(positions < position_B[:, None], positions, -1)
