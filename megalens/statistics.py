"""Mean and variance of activations: what a lens is standardised by, and what its figures are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor

_IN_META = {"mean": "mean", "var": "variance", "mean_normalised": "mean_normalised"}


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Statistics of some activations, ``[D]`` each.

    float64 as they are summed; float32 as readers, loaders and checkpoints give them.

    Args:
        mean: per dimension.
        var: per dimension, of the population.
        mean_normalised: mean of the unit-length activations (itself not of unit length).
    """

    mean: Tensor
    var: Tensor
    mean_normalised: Tensor

    @classmethod
    def from_meta(cls, meta: dict) -> ActivationStatistics:
        """From a dump's ``meta.json``, as float32."""
        return cls(**{name: torch.tensor(meta[key], dtype=torch.float64).float() for name, key in _IN_META.items()})

    def to_meta(self) -> dict[str, list[float]]:
        """The entries of a dump's ``meta.json``."""
        return {key: getattr(self, name).tolist() for name, key in _IN_META.items()}

    @classmethod
    def mixed(cls, parts: Sequence[ActivationStatistics], shares: Sequence[SupportsFloat]) -> ActivationStatistics:
        """Statistics of rows of which each part gives its share (the shares add up to 1), float32."""
        if len(parts) == 1:
            return parts[0]

        def average(values: list[Tensor]) -> Tensor:
            shared = (value.double() * float(share) for value, share in zip(values, shares, strict=True))
            return sum(shared, torch.zeros((), dtype=torch.float64)).float()

        mean_D = average([part.mean for part in parts])
        var_D = average([part.var + (part.mean - mean_D) ** 2 for part in parts])
        return cls(mean_D, var_D, average([part.mean_normalised for part in parts]))
