"""What several samples agree on. The share of samples that say a word is a better confidence than the probability they say it with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

Samples = Sequence[frozenset[str]]
"""The content words of several samples of one row."""


def shares(samples: Samples) -> dict[str, float]:
    """The share of samples that say each word."""
    counts = Counter(word for words in samples for word in words)
    return {word: count / len(samples) for word, count in counts.items()}


def kept(rows: Sequence[Samples], right: Sequence[frozenset[str]], least: float) -> dict[str, float]:
    """Keep the words that at least a share of the samples says.

    Args:
        rows: the samples of each row.
        right: the words that would be right there.
        least: the share.

    Returns:
        ``precision``: share of kept words that are right (not a number where none is kept); ``coverage``: share of rows with a kept word.
    """
    words = [[word for word, share in shares(samples).items() if share >= least] for samples in rows]
    count = sum(map(len, words))
    hits = sum(word in good for each, good in zip(words, right, strict=True) for word in each)
    return {"precision": hits / count if count else float("nan"), "coverage": sum(map(bool, words)) / len(rows)}


def calibration_error(rows: Sequence[Samples], right: Sequence[frozenset[str]], bins: int = 10) -> float:
    """Expected calibration error of the share of samples as the probability of being right, over all words said."""
    pairs = [(share, word in good) for samples, good in zip(rows, right, strict=True) for word, share in shares(samples).items()]
    if not pairs:
        return float("nan")
    share_N, right_N = (np.array(column, float) for column in zip(*pairs, strict=True))
    bin_N = np.minimum((share_N * bins).astype(int), bins - 1)
    parts = [(bin_N == b) for b in range(bins)]
    return float(sum(abs(share_N[part].mean() - right_N[part].mean()) * part.mean() for part in parts if part.any()))


def agreement(samples: Samples, others: Samples | None = None) -> float:
    """Mean Jaccard similarity of pairs: of one row's samples, or of one row's with another's; two empty texts agree in nothing."""
    pairs = (
        [(a, b) for i, a in enumerate(samples) for b in samples[i + 1 :]] if others is None else [(a, b) for a in samples for b in others]
    )
    return float(np.mean([len(a & b) / len(a | b) if a | b else 0.0 for a, b in pairs])) if pairs else float("nan")
