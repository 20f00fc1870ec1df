"""Identification: is a rebuild nearer to its own activation than to others'? Chance is known, and no scale or shrinkage helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def drawn_partners(doc_ids: np.ndarray, sample_ids: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """For each row, the numbers of ``count`` rows of other documents ``[N, count]``; -1 where there are not so many.

    A row's partners depend on the set of rows and the seed, not on the rows' order.
    """
    order = np.argsort(sample_ids, kind="stable")
    partners_NK = np.full((len(doc_ids), count), -1)
    for row in order:
        others = order[doc_ids[order] != doc_ids[row]]
        chosen = np.random.default_rng((seed, int(sample_ids[row]))).permutation(len(others))[:count]
        partners_NK[row, : len(chosen)] = others[chosen]
    return partners_NK


def hard_partners(
    doc_ids: np.ndarray,
    sample_ids: np.ndarray,
    token_N: np.ndarray,
    norm_N: np.ndarray,
    count: int,
    topics: Sequence[str | None] | None = None,
) -> np.ndarray:
    """The same, of rows that are hard to tell apart: the same token at P, then the same topic, then the nearest norm.

    Args:
        token_N: token id at P.
        norm_N: norm of the activation.
        topics: of the document, where it is known.
    """
    order = np.argsort(sample_ids, kind="stable")
    topic = np.array(topics if topics is not None else [None] * len(doc_ids), dtype=object)
    partners_NK = np.full((len(doc_ids), count), -1)
    for row in order:
        others = order[doc_ids[order] != doc_ids[row]]
        same_topic = (topic[others] == topic[row]) & (topic[row] is not None)
        far = np.abs(norm_N[others] - norm_N[row])
        nearest = np.lexsort((far, ~same_topic, token_N[others] != token_N[row]))[:count]
        partners_NK[row, : len(nearest)] = others[nearest]
    return partners_NK


def choice(u_ND: np.ndarray, u_hat_ND: np.ndarray, mean_D: np.ndarray, partners_NK: np.ndarray) -> np.ndarray:
    """Whether each row's rebuild is nearest to its own activation among itself and its partners' ``[N]``; ties share the point.

    Nearness is the cosine of what is left without the mean, so that the common direction does not decide.

    Args:
        u_ND: activations of unit length.
        u_hat_ND: rebuilds of unit length.
        mean_D: training mean of the unit-length activations.
        partners_NK: :func:`drawn_partners` or :func:`hard_partners`; rows with fewer than K partners are not a number.
    """
    centred_ND, rebuilt_ND = _unit(u_ND - mean_D), _unit(u_hat_ND - mean_D)
    own_N = (centred_ND * rebuilt_ND).sum(-1)
    other_NK = np.einsum("nd,nkd->nk", rebuilt_ND, centred_ND[partners_NK])
    tied_N = np.isclose(other_NK, own_N[:, None], rtol=0, atol=1e-12).sum(-1)
    first_N = (other_NK <= own_N[:, None] + 1e-12).all(-1)
    return np.where((partners_NK < 0).any(-1), np.nan, first_N / (1 + tied_N))


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)
