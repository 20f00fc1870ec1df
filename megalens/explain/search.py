"""Ways to choose an explanation. The activation is at hand, so a search may look for the words that rebuild it best.

A new search is a class like those here, registered in :data:`SEARCHES` under the name by which it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalens.evaluate import EvaluationError
from megalens.evaluate.measure import Said, Search, read_by_lens, said
from megalens.evaluate.metrics import normalised_error
from megalens.lens.lens import ConsistencyLens
from megalens.ops import noise_keys


@dataclass(frozen=True)
class Greedy:
    """The most likely token at each place."""

    name = "greedy"

    def __call__(self, lens: ConsistencyLens, a_BD: Tensor, row_B: Tensor) -> Said:
        """Explain activations ``[B, D]``."""
        return said(lens, lens.verbalize(a_BD))


@dataclass(frozen=True)
class BestOf:
    """Of ``k`` explanations, the greedy one among them, the one from which the lens rebuilds the activation best.

    The measure is the distance of the unit-length vectors. A text that says nothing is chosen only where no other is there.

    Args:
        k: explanations for each row.
        noise: temperature at which all but the greedy one are sampled.

    A sample depends on the lens's seed, the row's number and its own number alone, so more of them never make a row worse.
    """

    k: int
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 2 or not 0 < self.noise < float("inf"):
            raise ValueError(f"best of {self.k} with noise {self.noise:g}: there must be at least 2 explanations, and noise above 0")

    @property
    def name(self) -> str:
        """``best of 8``, and the noise where it is not 1."""
        return f"best of {self.k}" + (f", noise {self.noise:g}" if self.noise != 1 else "")

    @torch.no_grad()
    def __call__(self, lens: ConsistencyLens, a_BD: Tensor, row_B: Tensor) -> Said:
        """Explain activations ``[B, D]``."""
        a_BD, row_B = a_BD.to(lens.mean.device), row_B.to(lens.mean.device)
        candidates = [Greedy()(lens, a_BD, row_B)]
        for draw in range(1, self.k):
            keys = partial(noise_keys, lens.config.seed, 0, row_B, draw=draw)
            candidates.append(said(lens, lens.verbalizer.decode(a_BD, keys, noise=self.noise).ids_BT))
        errors_KB = np.stack([_errors(lens, a_BD, each.texts) for each in candidates])
        best_B = errors_KB.argmin(0)
        return Said(*([getattr(candidates[k], name)[i] for i, k in enumerate(best_B)] for name in ("texts", "round_trips", "unfinished")))


class Asked(NamedTuple):
    """How a search is made of what follows its name, strings between colons; and how it is written, for messages."""

    make: Callable[..., Search]
    usage: str


SEARCHES: dict[str, Asked] = {
    "greedy": Asked(Greedy, "greedy"),
    "best_of": Asked(
        lambda k, noise="1": BestOf(int(k), float(noise)),
        "best_of:K or best_of:K:NOISE with K at least 2 and NOISE above 0, e.g. best_of:8",
    ),
}
"""By the name they are asked for."""


def search_named(spelling: str) -> Search:
    """The search that a spelling asks for, e.g. ``greedy`` or ``best_of:8``.

    Raises:
        EvaluationError: there is none of this name, or its arguments make no sense.
    """
    name, *arguments = spelling.split(":")
    try:
        return SEARCHES[name].make(*arguments)
    except (KeyError, TypeError, ValueError):
        raise EvaluationError(f"'{spelling}' is no search; write {', or '.join(asked.usage for asked in SEARCHES.values())}") from None


def _errors(lens: ConsistencyLens, a_BD: Tensor, texts: list[str]) -> np.ndarray:
    """Distance of unit-length activation and rebuild ``[B]``; infinite where there is no usable text or rebuild."""
    rebuild = read_by_lens(lens, texts)
    usable_B = rebuild.a_hat_BD.isfinite().all(-1) & ~rebuild.failed_B
    return np.where(usable_B.cpu().numpy(), normalised_error(a_BD, rebuild.a_hat_BD), np.inf)
