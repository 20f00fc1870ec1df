"""How a row's score compares with what other rows' texts score there, and whether it would score so again: confidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalens.evaluate.trust.judged import Statistic, mean

CONFIDENCES = ("none", "weak", "moderate", "strong")


def above_chance(own_N: np.ndarray, others_NK: np.ndarray) -> Statistic:
    """Share of rows whose text scores above the 95th percentile of other rows' texts read against them; 0.05 for noise.

    Args:
        own_N: FVE of each row by its own text.
        others_NK: FVE of each row by the texts of other rows.
    """
    return mean((own_N > np.quantile(others_NK, 0.95)).astype(float))


def retest(first_N: np.ndarray, second_N: np.ndarray, other_N: np.ndarray) -> Statistic:
    """Rank correlation over rows of two independent samples' FVE, less that with a partner's second sample read against the row.

    What makes a row easy for any text is in both and cancels.
    """
    ranks = [_ranks(x) for x in (first_N, second_N, other_N)]
    return lambda weights_RN: _correlation(ranks[0], ranks[1], weights_RN) - _correlation(ranks[0], ranks[2], weights_RN)


@dataclass(frozen=True)
class Confidence:
    """Bounds of a row's FVE between ``none``, ``weak``, ``moderate`` and ``strong``, fitted on held-out rows of one lens.

    Args:
        chance: the 95th percentile of wrong pairs: at most this is ``none``.
        typical: the median of own texts.
        high: their 90th percentile.
        holds: did a second sample's FVE rise with the bucket of the first? Where not, no bucket may be shown.
    """

    chance: float
    typical: float
    high: float
    holds: bool

    def of(self, fve: float) -> str | None:
        """The bucket of a score; None where buckets mean nothing for this lens."""
        return CONFIDENCES[_bucket(fve, self)] if self.holds and np.isfinite(fve) else None


def fit_confidence(first_N: np.ndarray, second_N: np.ndarray, others_NK: np.ndarray, least: int = 5) -> Confidence:
    """Bounds from the first of two samples of each row, checked on the second.

    Args:
        first_N, second_N: FVE of each row by two independent samples.
        others_NK: FVE of each row by the texts of other rows.
        least: buckets with fewer rows are not asked.
    """
    chance = float(np.quantile(others_NK, 0.95))
    typical, high = (max(chance, float(np.quantile(first_N, share))) for share in (0.5, 0.9))
    bounds = Confidence(chance, typical, high, True)
    bucket_N = np.array([_bucket(fve, bounds) for fve in first_N])
    means = [second_N[bucket_N == b].mean() for b in range(len(CONFIDENCES)) if (bucket_N == b).sum() >= least]
    return Confidence(chance, typical, high, len(means) > 1 and bool(np.all(np.diff(means) > 0)))


def _bucket(fve: float, bounds: Confidence) -> int:
    return 0 if fve <= bounds.chance else 1 + (fve >= bounds.typical) + (fve >= bounds.high)


def _ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks, the mean of their places where values are equal."""
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[inverse]


def _correlation(x_N: np.ndarray, y_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    share_RN = weights_RN / weights_RN.sum(1, keepdims=True)
    x_RN, y_RN = (z_N - (share_RN @ z_N)[:, None] for z_N in (x_N, y_N))
    over_R = np.sqrt((share_RN * x_RN**2).sum(1) * (share_RN * y_RN**2).sum(1))
    return np.divide((share_RN * x_RN * y_RN).sum(1), over_R, out=np.zeros(len(over_R)), where=over_R > 0)
