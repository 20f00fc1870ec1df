"""Every quality figure, from per-row statistics: pure functions on small float64 arrays.

A row is one activation. Its statistics are computed batch by batch (:func:`row_statistics`, :func:`logit_statistics`), joined
(:func:`join`), and only then made into figures (:func:`figures`): figures are ratios of sums over all rows, never means over batches.

The trainer's validation, for each held-out batch::

    reference = Reference.of(train_loader.reader)                            # the TRAINING activations' statistics
    a_hat_BD = lens.reconstruct(ids_BT, lengths_B)
    rows = row_statistics(batch["activation"], a_hat_BD, reference)
    read = lens.read(batch)         # only for kl, kl_recovered and top1
    a_hat_BD, _ = mean_where_failed(a_hat_BD, lens.mean)
    patched = partial(lens.subject.patched_logits, read)
    true_BV = lens.subject.lm.logits(read.normed_BD)
    rows |= logit_statistics(true_BV, patched(a_hat_BD), patched(lens.mean.expand_as(a_hat_BD)))
    parts.append(rows)

and at the end ``figures(join(parts))`` gives ``{"fve": ..., "fve_nrm": ..., ...}``, to be logged as ``val/fve_nrm`` and so on.

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
==============  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

QUANTILES = {"cos_q05": 0.05, "cos_q50": 0.5, "cos_q95": 0.95}
_RATIOS = {  # figure: 1 - sum of the first / sum of the second
    "fve": ("error", "spread"),
    "fve_std": ("error_std", "spread_std"),
    "fve_nrm": ("error_nrm", "spread_nrm"),
    "kl_recovered": ("kl", "kl_mean"),
}
_MEANS = ("cos", "kl", "top1", "failed")
_CHUNK = 2**22  # elements of a bootstrap's work array


@dataclass(frozen=True)
class Reference:
    """What variance is explained against: statistics of the TRAINING activations, float64 ``[D]``.

    ``mean`` and ``var`` per dimension; ``mean_normalised``, the mean of the unit-normalised activations (itself not of unit length).
    """

    mean: np.ndarray
    var: np.ndarray
    mean_normalised: np.ndarray

    @classmethod
    def of(cls, statistics) -> Reference:
        """From whatever has these three as attributes: the training dump's ``ShardReader``, for one."""
        return cls(*(np.asarray(getattr(statistics, name).cpu(), np.float64) for name in ("mean", "var", "mean_normalised")))


def mean_where_failed(a_hat_BD: Tensor, mean_D: Tensor, failed_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rebuilds ``[B, D]`` with the mean activation in place of failed rows, and which rows failed ``[B]``.

    A row fails when ``failed_B`` says so (its explanation is no text) or its rebuild is not finite.
    """
    failed = ~a_hat_BD.isfinite().all(-1)
    if failed_B is not None:
        failed = failed | torch.as_tensor(failed_B, device=failed.device)
    return torch.where(failed[:, None], mean_D.to(a_hat_BD), a_hat_BD), failed


def row_statistics(a_BD: Tensor, a_hat_BD: Tensor, reference: Reference, failed_B: Tensor | None = None) -> dict[str, np.ndarray]:
    """Squared errors and spreads of each row in the three spaces, its cosine, and whether it failed; float64 ``[B]`` each.

    Args:
        a_BD: activations.
        a_hat_BD: their rebuilds; rows that are not finite are scored as the mean activation.
        reference: the training activations' statistics.
        failed_B: rows that failed for another reason (no text); scored as the mean activation too.
    """
    a = _numpy(a_BD)
    a_hat, failed = mean_where_failed(torch.as_tensor(a_hat_BD).cpu().double(), torch.from_numpy(reference.mean), failed_B)
    a_hat = a_hat.numpy()
    inverse_std = np.where(reference.var > 0, 1 / np.sqrt(np.where(reference.var > 0, reference.var, 1)), 0)
    u, u_hat = _unit(a), _unit(a_hat)
    return {
        "error": _squares(a - a_hat),
        "spread": _squares(a - reference.mean),
        "error_std": _squares((a - a_hat) * inverse_std),
        "spread_std": _squares((a - reference.mean) * inverse_std),
        "error_nrm": _squares(u - u_hat),
        "spread_nrm": _squares(u - reference.mean_normalised),
        "cos": (u * u_hat).sum(-1),
        "failed": _numpy(failed),
    }


def logit_statistics(gold_BV: Tensor, patched_BV: Tensor, mean_patched_BV: Tensor | None = None) -> dict[str, np.ndarray]:
    """``kl`` and ``kl_mean`` (nats) and ``top1`` (0 or 1) of each row, float64 ``[B]``.

    Args:
        gold_BV: the subject's next-token logits, untouched.
        patched_BV: the same with the rebuild patched in at P.
        mean_patched_BV: the same with the mean activation patched in; without it there is no ``kl_mean``, and no ``kl_recovered``.
    """
    p = gold_BV.float().log_softmax(-1)
    rows = {"kl": _numpy(_kl(p, patched_BV)), "top1": _numpy(gold_BV.argmax(-1) == patched_BV.argmax(-1))}
    return rows if mean_patched_BV is None else rows | {"kl_mean": _numpy(_kl(p, mean_patched_BV))}


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The statistics of several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def row_fve(rows: dict[str, np.ndarray]) -> np.ndarray:
    """``1 - |u - u_hat|^2 / |u - m|^2`` of each row, ``[B]``: the share of ``fve_nrm`` that is this row's own.

    ``fve_nrm`` is the mean of these weighted by ``|u - m|^2``. It has no lower bound; a row that lies near the mean can score far below 0.
    """
    return 1 - rows["error_nrm"] / np.maximum(rows["spread_nrm"], 1e-12)


def figures(rows: dict[str, np.ndarray], doc_ids: np.ndarray | None = None, bootstrap: int = 0, seed: int = 0) -> dict[str, float]:
    """All figures of the rows; those of the logits where the rows have them.

    Args:
        rows: statistics, ``[N]`` each.
        doc_ids: document of each row ``[N]``; rows of one document are not independent. Needed for intervals only.
        bootstrap: resamples of documents (with replacement); 0: no intervals.
        seed: of the resampling.

    Returns:
        ``{name: value}``, and with ``bootstrap`` also ``name_low`` and ``name_high``, the 2.5 and 97.5 % quantiles of the resampled figure.
    """
    count = len(rows["error"])
    result = {name: float(value[0]) for name, value in _weighted_figures(rows, np.ones((1, count))).items()}
    if bootstrap:
        parts = [_weighted_figures(rows, weights) for weights in _resamples(np.asarray(doc_ids), bootstrap, seed)]
        for name in tuple(result):
            low, high = np.quantile(np.concatenate([part[name] for part in parts]), (0.025, 0.975))
            result |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def _weighted_figures(rows: dict[str, np.ndarray], weights_RN: np.ndarray) -> dict[str, np.ndarray]:
    """Figures ``[R]`` under R different weightings of the rows."""
    totals = {name: weights_RN @ value for name, value in rows.items()}
    count = weights_RN.sum(1)
    result = {name: 1 - totals[over] / np.maximum(totals[under], 1e-12) for name, (over, under) in _RATIOS.items() if under in rows}
    result |= {name: totals[name] / count for name in _MEANS if name in rows}
    order = np.argsort(rows["cos"])
    reached = np.cumsum(weights_RN[:, order], axis=1)
    for name, share in QUANTILES.items():
        place = (reached < share * count[:, None]).sum(1)  # the smallest value that at least this share of the rows does not exceed
        result[name] = rows["cos"][order][np.minimum(place, len(order) - 1)]
    return result


def _resamples(doc_ids: np.ndarray, bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    """Weights ``[r, N]`` of resampled documents, a few resamples at a time so that memory stays small."""
    _, document = np.unique(doc_ids, return_inverse=True)
    documents = document.max() + 1
    draw = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(doc_ids))
    for start in range(0, bootstrap, step):
        size = min(step, bootstrap - start)
        drawn = draw.integers(0, documents, (size, documents)) + documents * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * documents).reshape(size, documents)[:, document].astype(np.float64)


def _kl(p_BV: Tensor, q_logits_BV: Tensor) -> Tensor:
    return (p_BV.exp() * (p_BV - q_logits_BV.float().log_softmax(-1))).sum(-1)


def _unit(a_BD: np.ndarray) -> np.ndarray:
    return a_BD / np.maximum(np.linalg.norm(a_BD, axis=-1, keepdims=True), 1e-12)


def _squares(x_BD: np.ndarray) -> np.ndarray:
    return np.square(x_BD).sum(-1)


def _numpy(x) -> np.ndarray:
    return torch.as_tensor(x).detach().cpu().double().numpy()
