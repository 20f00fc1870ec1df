"""Warm start from context tails: texts that cost nothing. The last tokens of a context say much of what its last activation holds."""

from __future__ import annotations

import torch
from torch import Tensor


def tail_ids(input_ids_BC: Tensor, position_B: Tensor, t_text: int, order: str) -> Tensor:
    """The context's tail ``[B, t_text]``, as a text of an explanation's length.

    ``forward``: the last ``t_text`` tokens up to P. ``last_first``: the token at P, then the ``t_text - 1`` tokens before it; what the
    activation holds almost verbatim is said first, before uncertain words can mislead. :func:`read_order` puts it back.
    Where the context is shorter, its first token is repeated.
    """
    back = torch.arange(t_text - 1, -1, -1, device=position_B.device)
    if order == "last_first":
        back = back.roll(1)
    return input_ids_BC.gather(1, (position_B[:, None] - back).clamp_min(0))


def read_order(embeds_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """A right-padded ``last_first`` text as the reconstructor reads it: the words that lead up, then the first token; padding stays."""
    if embeds_BTD.shape[1] < 2:
        return embeds_BTD
    if lengths_B is None:
        return embeds_BTD.roll(-1, 1)
    place = torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device)[None]
    last_B1 = (lengths_B - 1)[:, None]
    source_BT = torch.where(place < last_B1, place + 1, torch.where(place == last_B1, 0, place))
    return embeds_BTD.gather(1, source_BT[..., None].expand_as(embeds_BTD))
