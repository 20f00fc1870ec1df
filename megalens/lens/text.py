"""Texts between the verbalizer and the reconstructor: decoded, sampled, or the context's own tail; and the order of their words.

Tails are the warm start: texts that cost nothing. The last tokens of a context say much of what its last activation holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """What a decode gives.

    Args:
        ids_BT: token ids.
        embeds_BTD: straight-through embeddings.
        normed_BTD: the normed hidden states each token was drawn from.
        log_prob_BT, entropy_BT: of each draw, in nats.
        lengths_B: tokens of each text; None: all T.
    """

    ids_BT: Tensor
    embeds_BTD: Tensor
    normed_BTD: Tensor
    log_prob_BT: Tensor
    entropy_BT: Tensor
    lengths_B: Tensor | None = None


@dataclass(frozen=True)
class Rollouts:
    """Texts sampled without gradient, K of each activation.

    Args:
        ids_BKT: token ids, right-padded.
        lengths_BK: tokens of each.
        log_prob_BKT: of each token under the verbalizer that sampled it, in nats.
    """

    ids_BKT: Tensor
    lengths_BK: Tensor
    log_prob_BKT: Tensor


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
