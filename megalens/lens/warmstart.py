"""Warm start from context tails: texts that cost nothing. The last tokens of a context say much of what its last activation holds."""

from __future__ import annotations

import torch
from torch import Tensor


def tail_ids(input_ids_BC: Tensor, position_B: Tensor, t_text: int, order: str) -> Tensor:
    """The context's tail ``[B, t_text]``, as a text of an explanation's length.

    ``forward``: the last ``t_text`` tokens up to P. ``last_first``: the token at P, then the ``t_text - 1`` tokens that end in it; what
    the activation holds almost verbatim is said first, before uncertain words can mislead, and the rest still reads forward.
    Where the context is shorter, its first token is repeated.
    """
    back = torch.arange(t_text - 1, -1, -1, device=position_B.device)
    if order == "last_first":
        back = torch.cat([back[-1:], back[1:]])
    elif order == "backward":
        back = back.flip(0)
    return input_ids_BC.gather(1, (position_B[:, None] - back).clamp_min(0))
