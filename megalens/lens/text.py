"""Texts between the verbalizer and the reconstructor: decoded, sampled, or the context's own tail; and the order of their words.

Tails are the warm start: texts that cost nothing. The last tokens of a context say much of what its last activation holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalens.ops import noise_keys


@dataclass(frozen=True)
class Text:
    """What a decode gives.

    Args:
        ids_BT: token ids.
        embeds_BTD: straight-through embeddings.
        normed_BTD: the normed hidden states each token was drawn from.
        log_prob_BT, entropy_BT: of each draw, in nats; 0 behind the end token.
        lengths_B: tokens of each text, its end token not among them; None: all T.
    """

    ids_BT: Tensor
    embeds_BTD: Tensor
    normed_BTD: Tensor
    log_prob_BT: Tensor
    entropy_BT: Tensor
    lengths_B: Tensor | None = None

    @property
    def drawn_BT(self) -> Tensor | None:
        """The draws that count; None: all."""
        return None if self.lengths_B is None else drawn(self.lengths_B, self.ids_BT.shape[1])


def lengths_of(ids_BT: Tensor, end_id: int) -> Tensor:
    """Tokens of each text ``[B]`` before its first end token; T where it never says it: then it is unfinished."""
    return (ids_BT == end_id).cumsum(1).eq(0).sum(1)


def drawn(lengths_B: Tensor, reach: int) -> Tensor:
    """Which of T draws of a text count ``[B, T]``: its tokens and the end token behind them."""
    return torch.arange(reach, device=lengths_B.device)[None] <= lengths_B[:, None]


def ended(text: Text, end_id: int | None) -> Text:
    """A decoded text with its lengths. Rows go on behind their end token, but what they say there counts for nothing: ids are the end
    token, log-probabilities and entropies 0."""
    if end_id is None:
        return text
    lengths_B = lengths_of(text.ids_BT, end_id)
    behind_BT = ~drawn(lengths_B, text.ids_BT.shape[1])
    nothing = {name: getattr(text, name).masked_fill(behind_BT, 0.0) for name in ("log_prob_BT", "entropy_BT")}
    return replace(text, ids_BT=text.ids_BT.masked_fill(behind_BT, end_id), lengths_B=lengths_B, **nothing)


def prefix_lengths(seed: int, update: int, sample_id_B: Tensor, least: int, most: int) -> Tensor:
    """How many tokens of its rollouts each sample is judged by ``[B]``: uniform in ``least .. most``, one number for all draws of a sample.

    Short prefixes are read as often as long ones, so that they come to carry the most. One number for a group, because draws of different
    lengths would differ in their length before they differ in their words.
    """
    keys_B = noise_keys(seed, update, sample_id_B, token=-1)
    return least + ((keys_B >> 16) & 0xFFFFFFFF) % (most - least + 1)


def tail_ids(input_ids_BC: Tensor, position_B: Tensor, t_text: int, order: str, lengths_B: Tensor | None = None) -> Tensor:
    """The context's tail ``[B, t_text]``, as a text of an explanation's length.

    ``forward``: the last ``t_text`` tokens up to P. ``last_first``: the token at P, then the ``t_text - 1`` tokens before it; what the
    activation holds almost verbatim is said first, before uncertain words can mislead. :func:`read_order` puts it back.
    Where the context is shorter, its first token is repeated.

    Args:
        lengths_B: the tokens of each tail, at most ``t_text``, in place of all; what stands behind them means nothing.
    """
    if lengths_B is not None:
        place = torch.arange(t_text, device=position_B.device)[None]
        back_BT = lengths_B[:, None] - place
        back_BT = back_BT.where(place > 0, 0) if order == "last_first" else back_BT - 1
        return input_ids_BC.gather(1, (position_B[:, None] - back_BT.clamp_min(0)).clamp_min(0))
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
