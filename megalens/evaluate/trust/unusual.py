"""Activations unlike those the lens was trained on: what it says of them cannot be checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Usual:
    """Where training activations lie: their mean ``[D]``, the inverse ``[D, D]`` of their shrunk covariance, held-out distances ``[N]``."""

    mean_D: np.ndarray
    inverse_DD: np.ndarray
    held_out_N: np.ndarray

    def distance(self, a_ND: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance of activations ``[N]``."""
        centred_ND = a_ND - self.mean_D
        return np.einsum("nd,de,ne->n", centred_ND, self.inverse_DD, centred_ND)

    def percentile(self, a_ND: np.ndarray) -> np.ndarray:
        """Share of held-out activations that are nearer ``[N]``; above 0.99 an activation is unusual."""
        return np.searchsorted(self.held_out_N, self.distance(a_ND), side="left") / len(self.held_out_N)


def fit_usual(training_ND: np.ndarray, held_out_ND: np.ndarray) -> Usual:
    """Fit on training activations; distances of held-out ones are what a percentile counts.

    The covariance is shrunk towards a multiple of the identity by as much as Ledoit and Wolf (2004) find best.
    """
    mean_D = training_ND.mean(0)
    covariance_DD = shrunk_covariance(training_ND - mean_D)
    usual = Usual(mean_D, np.linalg.inv(covariance_DD), np.zeros(0))
    return Usual(usual.mean_D, usual.inverse_DD, np.sort(usual.distance(held_out_ND)))


def shrunk_covariance(centred_ND: np.ndarray) -> np.ndarray:
    """``(1 - s) S + s tr(S) / D I`` with the s of Ledoit and Wolf, "A well-conditioned estimator" (2004), lemma 3.3."""
    count, width = centred_ND.shape
    sample_DD = centred_ND.T @ centred_ND / count
    level = np.trace(sample_DD) / width
    spread = np.square(sample_DD - level * np.eye(width)).sum()
    noise = (np.square(centred_ND).sum(1) ** 2).sum() / count**2 - np.square(sample_DD).sum() / count
    share = float(np.clip(noise / spread, 0, 1)) if spread > 0 else 1.0
    return (1 - share) * sample_DD + (share + 1e-12) * level * np.eye(width)
