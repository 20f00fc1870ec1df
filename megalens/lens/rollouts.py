"""Texts sampled without gradient, several of each activation: what a training is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megalens.lens.sampling import ITS_OWN, Law, Ranks
from megalens.lens.text import drawn


@dataclass(frozen=True)
class Rollouts:
    """Texts sampled without gradient, K of each activation.

    Args:
        ids_BKT: token ids, right-padded (with the end token, where there is one).
        lengths_BK: tokens of each, without the end token; T where a text never said it.
        log_prob_BKT: of each token under the law it was sampled by, in nats; 0 behind an end token.
        law: the temperature and the nucleus.
        floor_BKT: of each nucleus (:func:`megalens.ops.sample_nucleus`); None where nothing was cut off.
        ends: is there an end token?
        tokens_per_text: mean number of :attr:`said_BKT` of a text over all of an optimizer step, on all ranks; None: T.
        figures: scalars to log: what is known of the step's texts without reading them.
    """

    ids_BKT: Tensor
    lengths_BK: Tensor
    log_prob_BKT: Tensor
    law: Law = ITS_OWN
    floor_BKT: Tensor | None = None
    ends: bool = False
    tokens_per_text: float | None = None
    figures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def said_BKT(self) -> Tensor:
        """Which tokens the verbalizer chose: those of the text, and the end token behind them."""
        return drawn(self.lengths_BK.flatten(), self.ids_BKT.shape[2]).view(self.ids_BKT.shape)

    @property
    def finished_BK(self) -> Tensor:
        """Which texts said the end token; all, where there is none."""
        return self.lengths_BK < self.ids_BKT.shape[2] if self.ends else torch.ones_like(self.lengths_BK, dtype=torch.bool)


def divided(parts: Sequence[Rollouts], rows: Sequence[int], ranks: Ranks) -> list[Rollouts]:
    """The rollouts of an optimizer step, sampled in ``parts``, as those of its micro-batches of so many ``rows`` each."""
    names = ("ids_BKT", "lengths_BK", "log_prob_BKT", "floor_BKT")
    whole: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names if getattr(parts[0], name) is not None
    }
    of_step = replace(parts[0], **whole)
    if of_step.ids_BKT.is_meta:  # shapes alone: nothing to count
        return [replace(of_step, **{name: value[:count] for name, value in whole.items()}) for count in rows]
    texts_NT, length = of_step.ids_BKT.flatten(0, 1), of_step.lengths_BK.double().mean()
    figures = {
        "rollout_distinct": torch.tensor(len(texts_NT.unique(dim=0)) / len(texts_NT)),
        "rollout_length": length,
        "rollout_unfinished": 1.0 - of_step.finished_BK.double().mean(),
    }
    tokens = float(of_step.said_BKT.sum()) / len(texts_NT)
    if of_step.ends:  # else all have as many
        tokens = ranks.reduce_mean({"tokens": tokens})["tokens"]
    pieces = {name: value.split(list(rows)) for name, value in whole.items()}
    return [
        replace(of_step, **{name: piece[i] for name, piece in pieces.items()}, tokens_per_text=tokens, figures=figures)
        for i in range(len(rows))
    ]
