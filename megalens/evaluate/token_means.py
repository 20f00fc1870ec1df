"""The mean training activation of each token at P: what a lens that reads nothing but that token could rebuild."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megalens.data.loader import ActivationLoader
from megalens.statistics import ActivationStatistics

SHRINK = 8.0
MOST_ROWS, _AT_ONCE = 65_536, 4096


class TokenMeans:
    """Means by token, shrunk towards the mean of all: ``(sum + 8 mean) / (n + 8)``.

    Args:
        token_N: the token at P of training rows.
        a_ND: their activations.
        mean_D: the mean of all training activations.
    """

    def __init__(self, token_N: np.ndarray, a_ND: np.ndarray, mean_D: np.ndarray):
        self._tokens, inverse_N, self._count_T = np.unique(token_N, return_inverse=True, return_counts=True)
        sums_TD = np.zeros((len(self._tokens), len(mean_D)))
        np.add.at(sums_TD, inverse_N, a_ND)
        self._means_TD = (sums_TD + SHRINK * mean_D) / (self._count_T + SHRINK)[:, None]
        self._mean_D = mean_D

    @classmethod
    def of(cls, loader: ActivationLoader, statistics: ActivationStatistics) -> TokenMeans:
        """From the first rows of a training dump (it is shuffled already)."""
        tokens, activations = [], []
        for start in range(0, min(MOST_ROWS, loader.num_rows), _AT_ONCE):
            batch = loader.rows(range(start, min(start + _AT_ONCE, MOST_ROWS, loader.num_rows)))
            tokens.append(batch["input_ids"].gather(1, batch["position"][:, None])[:, 0].numpy())
            activations.append(batch["activation"].float().numpy())
        return cls(np.concatenate(tokens), np.concatenate(activations), statistics.mean.double().cpu().numpy())

    def predict(self, token_N: np.ndarray) -> np.ndarray:
        """The mean of each token ``[N, D]``; that of all for a token that no training row has."""
        place_N, known_N = self._places(token_N)
        return np.where(known_N[:, None], self._means_TD[place_N], self._mean_D)

    def covered(self, token_N: np.ndarray) -> np.ndarray:
        """Which tokens have at least 8 training rows ``[N]``."""
        place_N, known_N = self._places(token_N)
        return known_N & (self._count_T[place_N] >= SHRINK)

    def rebuild(self, input_ids_BC: Tensor, position_B: Tensor) -> Tensor:
        """Predictions ``[B, D]`` (float32) for the tokens at P."""
        token_B = input_ids_BC.gather(1, position_B[:, None])[:, 0]
        return torch.from_numpy(self.predict(token_B.cpu().numpy())).float().to(input_ids_BC.device)

    def _places(self, token_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place_N = np.searchsorted(self._tokens, token_N).clip(max=len(self._tokens) - 1)
        return place_N, self._tokens[place_N] == token_N
