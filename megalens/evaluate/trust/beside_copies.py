"""Figures that tell whether words carry what they seem to: beside a copy of the context, and through a reader that never met the lens.

They are never a training signal, nor do they choose a checkpoint.

==============  =====================================================================================
other_reader    ``fve_nrm`` of the same texts through another reader than the lens's own reconstructor
channel         (other_reader / fve_nrm of the texts) / (the same of copies): what another reader keeps of the texts' figure, relative
                to what it keeps of copies; 1 for plain words, towards 0 for a private code. Only where texts and copies have an
                ``fve_nrm`` above 0.1.
gain_over_copy  what texts add to copies: the fit of u by copy's rebuild, texts' rebuild and m, less that by copy's rebuild and m. Fits
                are least squares with one weight for each vector, made on half of the documents and scored on the other, and the reverse.
==============  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from megalens.evaluate.measure import Rebuild
from megalens.evaluate.metrics import Figure, Rows, mean_where_failed, normalised_error, unit
from megalens.statistics import ActivationStatistics

_LEAST = 0.1  # fve_nrm below which a ratio to it says nothing


def trust_statistics(a_BD: Tensor, texts: Rebuild, copies: Rebuild, statistics: ActivationStatistics, other: Mapping[str, Rebuild]) -> Rows:
    """What :data:`FIGURES` are made of, beside ``error_nrm`` and ``spread_nrm``; float64 ``[B]``, the products ``[B, 4, 4]``.

    Args:
        a_BD: activations.
        texts, copies: what the lens's reconstructor rebuilt from explanations and from copies.
        other: what another reader rebuilt of ``texts`` and ``copies``.
    """
    mean_D, m_D = statistics.mean.to(a_BD), statistics.mean_normalised.double().cpu().numpy()

    def filled(rebuild: Rebuild) -> Tensor:
        return mean_where_failed(rebuild.a_hat_BD, mean_D, rebuild.failed_B)[0]

    vectors_B4D = np.stack([unit(a_BD), unit(filled(texts)), unit(filled(copies)), np.broadcast_to(m_D, a_BD.shape)], axis=1)
    return {
        "copy_error": normalised_error(a_BD, filled(copies)),
        "other_error": normalised_error(a_BD, filled(other["texts"])),
        "other_copy_error": normalised_error(a_BD, filled(other["copies"])),
        "products": vectors_B4D @ vectors_B4D.transpose(0, 2, 1),
    }


def halves(doc_ids: np.ndarray) -> np.ndarray:
    """0 or 1 for each row ``[N]``, the same for rows of one document: every other document."""
    return np.unique(doc_ids, return_inverse=True)[1] % 2


def _explained(rows: Rows, weights_RN: np.ndarray, error: str) -> np.ndarray:
    return 1 - weights_RN @ rows[error] / np.maximum(weights_RN @ rows["spread_nrm"], 1e-12)


def _other_reader(rows: Rows, weights_RN: np.ndarray) -> np.ndarray:
    return _explained(rows, weights_RN, "other_error")


def _channel(rows: Rows, weights_RN: np.ndarray) -> np.ndarray:
    names = ("error_nrm", "copy_error", "other_error", "other_copy_error")
    texts_R, copies_R, other_texts_R, other_copies_R = (_explained(rows, weights_RN, name) for name in names)
    said = (np.minimum(texts_R, copies_R) > _LEAST) & (other_copies_R > 0)
    ratio_R = np.full(len(texts_R), np.nan)
    ratio_R[said] = other_texts_R[said] / texts_R[said] / (other_copies_R[said] / copies_R[said])
    return ratio_R


def _gain_over_copy(rows: Rows, weights_RN: np.ndarray) -> np.ndarray:
    sums = [np.einsum("rn,nij->rij", weights_RN[:, rows["half"] == half], rows["products"][rows["half"] == half]) for half in (0, 1)]
    return _fitted(sums, [1, 2, 3]) - _fitted(sums, [2, 3])


def _fitted(sums: list[np.ndarray], by: list[int]) -> np.ndarray:
    """``1 - sum |u - fit|^2 / sum |u - m|^2`` ``[R]``, each half's fit by some of the vectors scored on the other half."""
    missed_R, spread_R = 0.0, 0.0
    for fit_R44, score_R44 in (sums, sums[::-1]):
        inverse_RFF = np.linalg.pinv(fit_R44[:, by][:, :, by], rcond=1e-9, hermitian=True)
        weights_RF = (inverse_RFF @ fit_R44[:, by, 0, None])[..., 0]
        both_R4 = np.zeros(score_R44.shape[:2])
        both_R4[:, 0], both_R4[:, by] = 1.0, -weights_RF
        missed_R = missed_R + np.einsum("ri,rij,rj->r", both_R4, score_R44, both_R4)
        spread_R = spread_R + score_R44[:, 0, 0] - 2 * score_R44[:, 0, 3] + score_R44[:, 3, 3]
    return 1 - missed_R / np.maximum(spread_R, 1e-12)


FIGURES = (
    Figure("other_reader", ("other_error", "spread_nrm"), _other_reader),
    Figure("channel", ("error_nrm", "copy_error", "other_error", "other_copy_error", "spread_nrm"), _channel),
    Figure("gain_over_copy", ("products", "half"), _gain_over_copy),
)


def copied_tokens(fve: float, curve: Mapping[int, float]) -> float:
    """How many copied tokens give an ``fve_nrm``, interpolated on the logarithm of their number.

    Args:
        curve: ``fve_nrm`` of copies by their number of tokens. Where more tokens are worth less, the smaller number counts.

    Returns:
        0 below the smallest number's figure; the largest number where no copy reaches it.
    """
    before: tuple[int, float] | None = None
    for count, value in sorted(curve.items()):
        if value >= fve:
            if before is None:
                return float(count) if value == fve else 0.0
            share = (fve - before[1]) / (value - before[1])
            return float(np.exp(np.log(before[0]) + share * np.log(count / before[0])))
        if before is None or value > before[1]:
            before = count, value
    return float(max(curve))
