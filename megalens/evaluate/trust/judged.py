"""A figure with an interval and a verdict: does it lie above the line that was drawn before anybody looked?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megalens.evaluate.metrics import resamples

Statistic = Callable[[np.ndarray], np.ndarray]
"""From R weightings of the rows ``[R, N]`` to the figure under each ``[R]``."""


@dataclass(frozen=True)
class Line:
    """What a figure must reach, and below what it has failed.

    Args:
        passes: the lower end of the interval must lie above it.
        fails: the upper end below it is a failure; None: the same.
    """

    passes: float
    fails: float | None = None


@dataclass(frozen=True)
class Judged:
    """A figure, its 95 % interval over documents, and ``pass``, ``open`` or ``fail``.

    ``open`` means that the rows do not decide it. A figure without rows is not a number and stays open.
    """

    value: float
    low: float
    high: float
    verdict: str


def judge(statistic: Statistic, doc_ids: np.ndarray, line: Line | None = None, bootstrap: int = 1000, seed: int = 0) -> Judged:
    """Take a figure of some rows, and its interval by resampling their documents with replacement.

    Args:
        statistic: linear or not in the weights; it must not depend on the order of the rows.
        doc_ids: the document of each row ``[N]``.
        line: None: a figure without a verdict (``open``).
        bootstrap: resamples; 0: the interval is the figure itself.
        seed: of the resampling.
    """
    value = float(statistic(np.ones((1, len(doc_ids))))[0])
    drawn = [statistic(weights_RN) for weights_RN in resamples(doc_ids, bootstrap, seed)] if bootstrap else [np.array([value])]
    known = np.concatenate(drawn)
    known = known[np.isfinite(known)]
    low, high = (float(x) for x in np.quantile(known, (0.025, 0.975))) if len(known) and np.isfinite(value) else (np.nan, np.nan)
    return Judged(value, low, high, "open" if line is None else _verdict(line, low, high))


def ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> Statistic:
    """The statistic ``sum of numerators / sum of denominators``; not a number where the latter is 0."""

    def value(weights_RN: np.ndarray) -> np.ndarray:
        below_R = weights_RN @ denominator_N
        return np.divide(weights_RN @ numerator_N, below_R, out=np.full(len(below_R), np.nan), where=below_R != 0)

    return value


def mean(value_N: np.ndarray) -> Statistic:
    """The statistic "mean over rows"."""
    return ratio(value_N, np.ones(len(value_N)))


def difference(one: Statistic, other: Statistic) -> Statistic:
    """The statistic ``one - other`` of the same rows: paired, so what rows have in common cancels."""
    return lambda weights_RN: one(weights_RN) - other(weights_RN)


def _verdict(line: Line, low: float, high: float) -> str:
    if low > line.passes:
        return "pass"
    return "fail" if high < (line.passes if line.fails is None else line.fails) else "open"
