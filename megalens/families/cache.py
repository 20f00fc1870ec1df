"""Keys and values of the blocks, appended to as text is read; differentiable, and made for many rows behind one shared prompt."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values by block, appended to by the blocks' attention (``update`` is the call they make). Differentiable.

    A stored batch of 1 is broadcast to the batch of what is appended, so that a static prompt is run once for all rows.

    Args:
        room: positions to make room for at the first append; a decode then writes each token into its place, and nothing is copied
            again. None: an append copies what is there, as compiled blocks always do.
    """

    def __init__(self, room: int | None = None, parent: KVCache | None = None):
        self.room = room
        self.stored: dict[int, tuple[Tensor, Tensor]] = dict(parent.stored) if parent else {}
        self.buffers: dict[int, tuple[Tensor, Tensor]] = dict(parent.buffers) if parent else {}

    def update(self, key: Tensor, value: Tensor, block: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, Q, head_dim]`` to what block ``block`` holds and return all of it, ``[B, heads, K, head_dim]``."""
        past, new = self.stored.get(block), (key, value)
        if past is None:
            self.stored[block] = new
        elif self.room is None:
            self.stored[block] = joined(past, new)
        else:
            if block not in self.buffers:
                self.buffers[block] = _empty(key, self.room), _empty(value, self.room)
            self.stored[block] = tuple(
                _Append.apply((buffer,), _rows(old, new), new) for buffer, old, new in zip(self.buffers[block], past, new, strict=True)
            )
        return self.stored[block]

    def length(self, block: int) -> int:
        """Positions that block ``block`` holds."""
        return self.stored[block][0].shape[2] if block in self.stored else 0

    def rows(self, rows_B: Tensor) -> KVCache:
        """A cache of the given rows of this one, for appends that are as wide."""
        chosen = KVCache()
        chosen.stored = {block: (key[rows_B], value[rows_B]) for block, (key, value) in self.stored.items()}
        return chosen

    def fork(self) -> KVCache:
        """A cache that starts from this one. What it appends stays out of this one, but uses the same room, if there is any yet."""
        return KVCache(self.room, self)


def joined(past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, heads, K + Q, head_dim]``: the past ones, broadcast to the new ones' batch, and behind them the new ones."""
    (old_key, old_value), (key, value) = past, new
    return torch.cat([_rows(old_key, key), key], dim=2), torch.cat([_rows(old_value, value), value], dim=2)


def _empty(new: Tensor, room: int) -> Tensor:
    return new.new_empty(*new.shape[:2], room, new.shape[3])


def _rows(old: Tensor, new: Tensor) -> Tensor:
    return old.expand(new.shape[0], -1, -1, -1)


class _Append(torch.autograd.Function):
    """``cat([past, new], dim=2)`` as a view of a buffer that holds the past already (or takes it, once)."""

    @staticmethod
    def forward(ctx, buffers: tuple[Tensor], past: Tensor, new: Tensor) -> Tensor:
        """The buffer comes in a tuple, hidden from autograd: earlier views of it stay as they are."""
        (buffer,) = buffers
        ctx.split = start, end = past.shape[2], past.shape[2] + new.shape[2]
        if past.data_ptr() != buffer.data_ptr():
            buffer.data[:, :, :start] = past
        buffer.data[:, :, start:end] = new
        return buffer.data[:, :, :end]

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Each part its own."""
        start, end = ctx.split
        return None, grad[:, :, :start], grad[:, :, start:end]
