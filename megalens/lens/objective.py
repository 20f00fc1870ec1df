"""The terms of the loss, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_mse(a_BD: Tensor, a_hat_BD: Tensor) -> Tensor:
    """``|a - a_hat|^2 / |a|^2``, mean over rows; 1 for a rebuild of zero."""
    a_BD = a_BD.to(a_hat_BD.dtype)
    return ((a_BD - a_hat_BD).square().sum(-1) / a_BD.square().sum(-1).clamp_min(1e-12)).mean()


def kl_from_logits(p_logits_BV: Tensor, q_logits_BV: Tensor) -> Tensor:
    """KL(p || q) per row, in nats."""
    p, q = p_logits_BV.log_softmax(-1), q_logits_BV.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def resample_error(a_BD: Tensor, a_hat_BD: Tensor) -> Tensor:
    """``a' - a_hat'`` of each row's partner, detached: the error another sample's rebuild makes (resample ablation).

    Partners are neighbours (rows 2i and 2i + 1), so that an even share of a global batch gives the same pairs on any number of ranks.

    Raises:
        ValueError: an odd number of rows.
    """
    if len(a_BD) % 2:
        raise ValueError(f"{len(a_BD)} rows on a rank can not be paired: batch_size / ranks must be even when kl_base_weight is not 0")
    error_BD = (a_BD - a_hat_BD).detach()
    return error_BD.view(-1, 2, error_BD.shape[-1]).flip(1).reshape(error_BD.shape)


def shared_contexts(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of a batch whose contexts hold every other row's: several positions of one document need one read.

    Returns:
        The rows to read ``[S]``, the longest context of each document, and for each row ``[B]`` which of these holds its own.
        Every row for itself where documents do not tell (the contexts of one are no beginnings of its longest).
    """
    ids_BC, position_B = batch["input_ids"], batch["position"]
    each = torch.arange(len(position_B), device=position_B.device)
    if ids_BC.is_meta:  # shapes alone can not tell
        return each, each
    doc_S, sequence_B = batch["doc_id"].unique(return_inverse=True)
    if len(doc_S) == len(each):
        return each, each
    rank_B = position_B * len(each) + each
    longest_S = torch.zeros_like(doc_S, dtype=rank_B.dtype).scatter_reduce(0, sequence_B, rank_B, "amax") % len(each)
    behind_BC = torch.arange(ids_BC.shape[1], device=ids_BC.device) > position_B[:, None]
    if not bool(((ids_BC == ids_BC[longest_S[sequence_B]]) | behind_BC).all()):
        return each, each
    return longest_S, sequence_B


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The loss: what has a weight, times it. A term of weight 0 takes no part in the backward pass."""
    parts = [weights[name] * value for name, value in terms.items() if weights.get(name)]
    return torch.stack(parts).sum()
