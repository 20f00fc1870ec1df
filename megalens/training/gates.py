"""Signs that a training on rollouts learns nothing, each with a bound in ``gates``: a warning when a figure crosses it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megalens.config import Gates


class Gate(NamedTuple):
    """A figure that must stay on one side of its bound, and what it means and mends where it does not."""

    bound: str
    figure: str
    at_least: bool
    meaning: str


GATES = (
    Gate("gap", "rollout_gap", True, "the texts do not depend on their activation; begin with a warm start (init_from)"),
    Gate("distinct", "rollout_distinct", True, "the texts are nearly all the same; raise policy.entropy or terms.reference_kl"),
    Gate("spread", "rollout_spread", True, "an activation's texts are all worth the same; raise rollouts.temperature or rollouts.draws"),
    Gate("reference_kl", "reference_kl", False, "the verbalizer has left its start; raise terms.reference_kl or lower learning_rate"),
    Gate("length", "rollout_length", True, "the texts are nearly empty; lower reward.price"),
    Gate("unfinished", "rollout_unfinished", False, "hardly a text ends; raise t_text or reward.price"),
)


class Watch:
    """Says once that a figure has crossed its bound, and again when it has been back in between."""

    def __init__(self, bounds: Gates):
        self._bounds, self._crossed = bounds, set[str]()

    def __call__(self, figures: Mapping[str, float]) -> Iterator[str]:
        """A line for each gate that is newly crossed.

        Args:
            figures: ``train/...`` by name; gates of others are left as they are.
        """
        for gate in GATES:
            bound, value = getattr(self._bounds, gate.bound), figures.get(f"train/{gate.figure}")
            if bound is None or value is None or math.isnan(value):
                continue
            if (value >= bound) if gate.at_least else (value <= bound):
                self._crossed.discard(gate.bound)
            elif gate.bound not in self._crossed:
                self._crossed.add(gate.bound)
                side = "below" if gate.at_least else "above"
                yield f"warning: train/{gate.figure} is {value:.3g}, {side} gates.{gate.bound}={bound:g}: {gate.meaning}"
