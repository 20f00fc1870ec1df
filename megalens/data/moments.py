"""Mean and variance of activations, from sums that merge exactly."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalens.statistics import ActivationStatistics


@dataclass
class Moments:
    """Sums over rows, in float64. Those of a union are the sum of the parts', so any number of writers merges exactly.

    Args:
        count: rows.
        total_D: sum of the activations.
        squares_D: sum of their squares.
        units_D: sum of the activations divided by their norms.
    """

    count: int
    total_D: np.ndarray
    squares_D: np.ndarray
    units_D: np.ndarray

    @classmethod
    def of(cls, a_ND: Tensor) -> Moments:
        """Of some rows."""
        rows_ND = a_ND.float().numpy().astype(np.float64)
        squares_ND = rows_ND * rows_ND
        norm_N1 = np.sqrt(squares_ND.sum(1, keepdims=True))
        return cls(len(rows_ND), rows_ND.sum(0), squares_ND.sum(0), (rows_ND / np.where(norm_N1 > 0, norm_N1, 1)).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total_D + other.total_D, self.squares_D + other.squares_D, self.units_D + other.units_D
        )

    def statistics(self) -> ActivationStatistics:
        """Mean and variance of the rows, float64."""
        mean_D = self.total_D / self.count
        var_D = np.maximum(self.squares_D / self.count - mean_D**2, 0)
        return ActivationStatistics(*(torch.from_numpy(value_D) for value_D in (mean_D, var_D, self.units_D / self.count)))

    def to_json(self) -> dict:
        """The count and the sums' bits."""
        sums_3D = np.stack([self.total_D, self.squares_D, self.units_D])
        return {"count": self.count, "sums": base64.b64encode(sums_3D.tobytes()).decode()}

    @classmethod
    def from_json(cls, values: dict) -> Moments:
        """What :meth:`to_json` gave."""
        return cls(values["count"], *np.frombuffer(base64.b64decode(values["sums"])).reshape(3, -1))
