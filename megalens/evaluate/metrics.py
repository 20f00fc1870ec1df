"""Every quality figure, from per-row statistics: pure functions on small float64 arrays.

A row is one activation. Its statistics are computed batch by batch (:func:`row_statistics`, :func:`logit_statistics`), joined
(:func:`join`), and only then made into figures (:func:`figures`): figures are ratios of sums over all rows, never means over batches.
:class:`megalens.evaluate.measure.RowScorer` gives the statistics of a lens's rows.

A new figure is an entry of :data:`FIGURES`; validation, evaluation, tables and the page take it from there.

With u = a / |a|, mu and var the training mean and variance per dimension, and m the (un-normalised) training mean of u:

==============  =====================================================================================
fve             1 - sum |a - a_hat|^2 / sum |a - mu|^2
fve_std         the same after dividing each dimension by sqrt(var); a dimension that never varies counts nothing
fve_nrm         1 - sum |u - u_hat|^2 / sum |u - m|^2
cos             mean of u . u_hat; cos_q05, cos_q50, cos_q95 its quantiles
kl              mean of KL(M(a) || M(a_hat)) at P, in nats
kl_recovered    1 - sum kl / sum kl with mu patched in
top1            share of rows where the most likely next token survives the patch
failed          share of rows without a usable explanation or rebuild; they are scored as a_hat = mu
tokens          mean number of tokens of an explanation; of the lens alone, where ``verbalizer.end_token`` is set
unfinished      share of texts that did not end within ``t_text`` tokens; likewise
==============  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalens.statistics import ActivationStatistics

Rows = dict[str, np.ndarray]
_CHUNK = 2**22  # elements of a bootstrap's work array


@dataclass(frozen=True)
class Figure:
    """A figure of some rows.

    Args:
        name: in files and tables.
        needs: the row statistics it is made of; where rows lack one, there is no such figure.
        value: from the statistics ``[N]`` and R weightings of the rows ``[R, N]`` to the figure under each ``[R]``.
        table: the number of the table that shows it; None: files alone.
        meaning: for the page's readers.
    """

    name: str
    needs: tuple[str, ...]
    value: Callable[[Rows, np.ndarray], np.ndarray]
    table: int | None = None
    meaning: str = ""


def _explained(name: str, error: str, spread: str, meaning: str) -> Figure:
    def value(rows: Rows, weights_RN: np.ndarray) -> np.ndarray:
        return 1 - weights_RN @ rows[error] / np.maximum(weights_RN @ rows[spread], 1e-12)

    return Figure(name, (error, spread), value, 0, meaning)


def _mean(name: str, meaning: str, table: int | None = 1) -> Figure:
    return Figure(name, (name,), lambda rows, weights_RN: weights_RN @ rows[name] / weights_RN.sum(1), table, meaning)


def _quantile(name: str, of: str, share: float) -> Figure:
    def value(rows: Rows, weights_RN: np.ndarray) -> np.ndarray:
        order = np.argsort(rows[of])
        reached = np.cumsum(weights_RN[:, order], axis=1)
        place = (reached < share * weights_RN.sum(1)[:, None]).sum(1)  # the smallest value that this share of the rows does not exceed
        return rows[of][order][np.minimum(place, len(order) - 1)]

    return Figure(name, (of,), value)


FIGURES = (
    _explained(
        "fve_nrm",
        "error_nrm",
        "spread_nrm",
        "share of the variance of the unit-length activations that the rebuilds explain, against the mean of the training ones; 1 is "
        "perfect, 0 is no better than that mean. A constant rebuild, itself of unit length, scores below 0.",
    ),
    _explained(
        "fve_std", "error_std", "spread_std", "the same on the activations themselves, each dimension divided by its standard deviation."
    ),
    _explained("fve", "error", "spread", "the same on the raw activations; a few dimensions and positions of huge norm dominate it."),
    _explained(
        "kl_recovered",
        "kl",
        "kl_mean",
        "1 - kl / (kl with the mean activation patched in): what of the subject's next-token prediction survives when the rebuild "
        "replaces the activation.",
    ),
    _mean("cos", "mean cosine between activation and rebuild."),
    _mean("kl", "KL divergence, in nats, between the subject's next-token predictions with the activation and with the rebuild."),
    _mean("top1", "share of rows where the most likely next token stays the same."),
    _mean("failed", "share of rows without a usable text or rebuild; they are scored as the mean activation."),
    _mean("tokens", "tokens of an explanation, read from its string, where texts end where they like.", table=None),
    _mean("unfinished", "share of texts that did not end within t_text tokens.", table=None),
    _quantile("cos_q05", "cos", 0.05),
    _quantile("cos_q50", "cos", 0.5),
    _quantile("cos_q95", "cos", 0.95),
)
TABLES = tuple(tuple(figure.name for figure in FIGURES if figure.table == table) for table in (0, 1))
"""The names of the figures in each table."""


def mean_where_failed(a_hat_BD: Tensor, mean_D: Tensor, failed_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rebuilds ``[B, D]`` with the mean activation in place of failed rows, and which rows failed ``[B]``.

    A row fails when ``failed_B`` says so (its explanation is no text) or its rebuild is not finite.
    """
    failed = ~a_hat_BD.isfinite().all(-1)
    if failed_B is not None:
        failed = failed | torch.as_tensor(failed_B, device=failed.device)
    return torch.where(failed[:, None], mean_D.to(a_hat_BD), a_hat_BD), failed


def row_statistics(a_BD: Tensor, a_hat_BD: Tensor, statistics: ActivationStatistics, failed_B: Tensor | None = None) -> Rows:
    """Squared errors and spreads of each row in the three spaces, its cosine, and whether it failed; float64 ``[B]`` each.

    Args:
        a_BD: activations.
        a_hat_BD: their rebuilds; rows that are not finite are scored as the mean activation.
        statistics: the training activations' statistics.
        failed_B: rows that failed for another reason (no text); scored as the mean activation too.
    """
    a, mean, var = _numpy(a_BD), _numpy(statistics.mean), _numpy(statistics.var)
    rebuilt, failed = mean_where_failed(torch.as_tensor(a_hat_BD).cpu().double(), torch.from_numpy(mean), failed_B)
    a_hat = rebuilt.numpy()
    inverse_std = np.where(var > 0, 1 / np.sqrt(np.where(var > 0, var, 1)), 0)
    u, u_hat = unit(a), unit(a_hat)
    return {
        "error": _squares(a - a_hat),
        "spread": _squares(a - mean),
        "error_std": _squares((a - a_hat) * inverse_std),
        "spread_std": _squares((a - mean) * inverse_std),
        "error_nrm": normalised_error(a, a_hat),
        "spread_nrm": _squares(u - _numpy(statistics.mean_normalised)),
        "cos": (u * u_hat).sum(-1),
        "failed": _numpy(failed),
    }


def normalised_error(a_BD: Tensor | np.ndarray, a_hat_BD: Tensor | np.ndarray) -> np.ndarray:
    """``|u - u_hat|^2`` of each row ``[B]``, float64; between 0 and 4."""
    return _squares(unit(a_BD) - unit(a_hat_BD))


def logit_statistics(true_BV: Tensor, patched_BV: Tensor) -> Rows:
    """``kl`` (nats) and ``top1`` (0 or 1) of each row, float64 ``[B]``.

    Args:
        true_BV: the subject's next-token logits, untouched.
        patched_BV: the same with the rebuild patched in at P.
    """
    p = true_BV.float().log_softmax(-1)
    kl_B = (p.exp() * (p - patched_BV.float().log_softmax(-1))).sum(-1)
    return {"kl": _numpy(kl_B), "top1": _numpy(true_BV.argmax(-1) == patched_BV.argmax(-1))}


def join(parts: list[Rows]) -> Rows:
    """The statistics of several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def row_fve(rows: Rows) -> np.ndarray:
    """``1 - |u - u_hat|^2 / |u - m|^2`` of each row, ``[B]``: the share of ``fve_nrm`` that is this row's own.

    ``fve_nrm`` is the mean of these weighted by ``|u - m|^2``. It has no lower bound; a row that lies near the mean can score far below 0.
    """
    return 1 - rows["error_nrm"] / np.maximum(rows["spread_nrm"], 1e-12)


def figures(
    rows: Rows, doc_ids: np.ndarray | None = None, bootstrap: int = 0, seed: int = 0, of: Sequence[Figure] = ()
) -> dict[str, float]:
    """All figures of the rows; those of the logits where the rows have them. A figure that is not finite is left out.

    Args:
        rows: statistics, ``[N]`` each.
        doc_ids: document of each row ``[N]``; rows of one document are not independent. Needed for intervals only.
        bootstrap: resamples of documents (with replacement); 0: no intervals.
        seed: of the resampling.
        of: figures beside :data:`FIGURES`.

    Returns:
        ``{name: value}``, and with ``bootstrap`` also ``name_low`` and ``name_high``, the 2.5 and 97.5 % quantiles of the resampled figure.
    """
    count = len(rows["error"])
    found = {name: float(value[0]) for name, value in _weighted_figures(rows, np.ones((1, count)), of).items()}
    result = {name: value for name, value in found.items() if np.isfinite(value)}
    if bootstrap:
        parts = [_weighted_figures(rows, weights, of) for weights in resamples(np.asarray(doc_ids), bootstrap, seed)]
        for name in tuple(result):
            values = np.concatenate([part[name] for part in parts])
            low, high = np.quantile(values[np.isfinite(values)], (0.025, 0.975)) if np.isfinite(values).any() else (result[name],) * 2
            result |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def _weighted_figures(rows: Rows, weights_RN: np.ndarray, of: Sequence[Figure]) -> Rows:
    """Figures ``[R]`` under R different weightings of the rows."""
    return {figure.name: figure.value(rows, weights_RN) for figure in (*FIGURES, *of) if all(name in rows for name in figure.needs)}


def resamples(doc_ids: np.ndarray, bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """Weights ``[r, N]`` of rows under resampled documents, a few resamples at a time so that memory stays small.

    Args:
        doc_ids: the document of each row ``[N]``.
        bootstrap: resamples in all.
    """
    _, document = np.unique(doc_ids, return_inverse=True)
    documents = document.max() + 1
    draw = np.random.default_rng(seed % (1 << 63))
    step = max(1, _CHUNK // len(doc_ids))
    for start in range(0, bootstrap, step):
        size = min(step, bootstrap - start)
        drawn = draw.integers(0, documents, (size, documents)) + documents * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * documents).reshape(size, documents)[:, document].astype(np.float64)


def unit(a_BD: Tensor | np.ndarray) -> np.ndarray:
    """The vectors at unit length, float64; one of length 0 stays so."""
    a_BD = _numpy(a_BD)
    return a_BD / np.maximum(np.linalg.norm(a_BD, axis=-1, keepdims=True), 1e-12)


def _squares(x_BD: np.ndarray) -> np.ndarray:
    return np.square(x_BD).sum(-1)


def _numpy(x) -> np.ndarray:
    return torch.as_tensor(x).detach().cpu().double().numpy()
