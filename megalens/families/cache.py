"""What blocks keep of the text they have read: keys and values, states. Differentiable, and made for many rows behind one shared prompt."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor


class KVCache:
    """Keys, values and states by block, for transformers' attention layers, which call it as they call transformers' own ``Cache``.

    Nothing is changed in place, so that gradients flow and a fork is cheap. A stored batch is repeated to the batch of what is appended:
    a static prompt is run once for all rows, an activation's slot once for all texts of it (row i of B for rows i * K ... i * K + K - 1).

    Args:
        room: positions to make room for at the first append; a decode then writes each token into its place, and nothing is copied
            again. None: an append copies what is there, as compiled blocks always do.
    """

    def __init__(self, room: int | None = None, parent: KVCache | None = None):
        self.room = room
        self.stored: dict[int, tuple[Tensor, Tensor]] = dict(parent.stored) if parent else {}
        self.buffers: dict[int, tuple[Tensor, Tensor]] = dict(parent.buffers) if parent else {}
        self.states: dict[tuple[int, str, int], Tensor] = dict(parent.states) if parent else {}
        self.lengths: dict[int, int] = dict(parent.lengths) if parent else {}
        self.batch = 1  # rows of what the blocks read now

    def length(self, block: int) -> int:
        """Positions that block ``block`` has read."""
        return self.lengths.get(block, 0)

    def rows(self, rows_B: Tensor) -> KVCache:
        """A cache of the given rows of this one, for appends that are as wide."""
        chosen = KVCache(parent=self)
        chosen.buffers = {}
        chosen.stored = {block: (key[rows_B], value[rows_B]) for block, (key, value) in self.stored.items()}
        chosen.states = {place: state[rows_B] for place, state in self.states.items()}
        return chosen

    def fork(self) -> KVCache:
        """A cache that starts from this one. What it appends stays out of this one, but uses the same room, if there is any yet."""
        return KVCache(self.room, self)

    # ------------------------------------------------------------------------------- what transformers' layers call

    def update(self, key: Tensor, value: Tensor, block: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, Q, head_dim]`` to what block ``block`` holds and return all of it, ``[B, heads, K, head_dim]``."""
        past, new = self.stored.get(block), (key, value)
        if past is None:
            self.stored[block] = new
        elif self.room is None:
            self.stored[block] = joined(past, new)
        else:
            if block not in self.buffers or len(self.buffers[block][0]) != len(key):
                self.buffers[block] = _empty(key, self.room), _empty(value, self.room)
            self.stored[block] = tuple(
                _Append.apply((buffer,), _rows(old, len(new)), new) for buffer, old, new in zip(self.buffers[block], past, new, strict=True)
            )
        return self.stored[block]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last columns ``[B, channels, columns]`` that a causal convolution read, or None."""
        return self._own_state(layer_idx, "conv", state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_
    ) -> Tensor:
        """Append columns; return those before them, as far as they are kept, and the new ones."""
        past = self._state(layer_idx, "conv", state_idx, len(conv_states))
        columns = conv_states if past is None else torch.cat([past, conv_states], dim=-1)
        kept = conv_kernel_size or (conv_states if past is None else past).shape[-1]
        self.states[layer_idx, "conv", state_idx] = columns[..., -kept:]
        return columns

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """What a recurrent layer keeps of all it has read, or None."""
        return self._own_state(layer_idx, "recurrent", state_idx)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_) -> Tensor:
        """Replace a recurrent layer's state."""
        self.states[layer_idx, "recurrent", state_idx] = recurrent_states
        return recurrent_states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Append ``[B, Q, dim]``, by which keys are chosen, and return all of it."""
        past = self._state(layer_idx, "indexer", 0, len(indexer_key_states))
        joined = indexer_key_states if past is None else torch.cat([past, indexer_key_states], dim=1)
        self.states[layer_idx, "indexer", 0] = joined
        return joined

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """:meth:`get_recurrent_state`, as MiniMax calls it."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, state: Tensor) -> None:
        """:meth:`update_recurrent_state`, as MiniMax calls it."""
        self.update_recurrent_state(state, layer_idx)

    def has_previous_state(self, layer_idx: int, state_idx: int | None = None) -> bool:
        """Whether a layer has read anything."""
        return any(block == layer_idx and (state_idx is None or place == state_idx) for block, _, place in self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Yes: layers then use no kernel that changes a state in place."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """:meth:`length`."""
        return self.length(layer_idx)

    def _own_state(self, block: int, name: str, place: int) -> Tensor | None:
        """A state that no other cache has: some layers change it in place."""
        state = self._state(block, name, place)
        if state is None:
            return None
        state = self.states[block, name, place] = state.clone()
        given = state.as_subclass(_State)
        given.write = partial(self.states.__setitem__, (block, name, place))  # type: ignore[attr-defined]  # an attribute of ours
        return given

    def _state(self, block: int, name: str, place: int, rows: int | None = None) -> Tensor | None:
        state, rows = self.states.get((block, name, place)), rows or self.batch
        return None if state is None else _rows(state, rows)


class _State(Tensor):
    """A state as layers are given it. What they copy into it takes its place in the cache; it stays as it is, for gradients' sake."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """All as for any tensor but ``copy_``."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.copy_:
                args[0].write(args[1])
                return args[1]
            return func(*args, **(kwargs or {}))


def joined(past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, heads, K + Q, head_dim]``: the past ones, repeated to the new ones' batch, and behind them the new ones."""
    (old_key, old_value), (key, value) = past, new
    return torch.cat([_rows(old_key, len(key)), key], dim=2), torch.cat([_rows(old_value, len(value)), value], dim=2)


def _empty(new: Tensor, room: int) -> Tensor:
    return new.new_empty(*new.shape[:2], room, new.shape[3])


def _rows(old: Tensor, rows: int) -> Tensor:
    """Each row as often as it takes to be so many."""
    return old.expand(rows, *old.shape[1:]) if len(old) in (1, rows) else old.repeat_interleave(rows // len(old), 0)


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
