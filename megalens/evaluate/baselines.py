"""Floors and ceilings: what the same rows score when the explanation is replaced by something that needs no lens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalens.data.pretokenize import encode
from megalens.evaluate.text import is_text, pad, to_ids, to_texts
from megalens.lens.lens import ConsistencyLens

LABELS = {
    "gold": "gold activation patched back",
    "copy_subject": "copy, untouched subject",
    "copy": "copy, same reconstructor",
    "lens": "LENS",
    "shuffled": "explanations of other rows",
    "empty": "empty text",
    "mean": "mean activation",
}
"""Every source of a rebuild, ceilings first, with its name in tables."""


@dataclass
class Rebuild:
    """Rebuilt activations ``[B, D]`` (float32) and the rows that failed because their text says nothing ``[B]``."""

    a_hat_BD: Tensor
    failed_B: Tensor


def rebuilds(lens: ConsistencyLens, batch: dict[str, Tensor], texts: list[str], other_texts: list[str]) -> dict[str, Rebuild]:
    """Rebuilds of one batch from every source of :data:`LABELS`, in that order.

    Args:
        batch: the rows, on the lens's device.
        texts: the lens's explanations.
        other_texts: explanations of other rows (:func:`partners`).

    ``copy`` is the context's last ``t_text`` tokens, written in the lens's ``tail_order`` so that its reconstructor reads them as they
    stood; ``copy_subject`` is those tokens as they stand (fewer where the context is shorter), read by the subject's own blocks without
    prompts or adapters, a BOS first where its tokenizer puts one. Copies too are re-tokenised from their string.
    """
    a_BD = batch["activation"]
    rows, tokenizer = len(a_BD), lens.tokenizer
    copies = context_tails(tokenizer, batch["input_ids"], batch["position"], lens.config.t_text)
    result = {"gold": _always(a_BD), "copy_subject": read_by_subject(lens, copies)}
    result["copy"] = read_by_lens(lens, to_texts(tokenizer, lens.tail_ids(batch)))
    result["lens"] = read_by_lens(lens, texts)
    result["shuffled"] = read_by_lens(lens, other_texts)
    nothing_BT = torch.zeros(rows, 0, dtype=torch.long)
    result["empty"] = _always(lens.reconstruct(nothing_BT, torch.zeros(rows, dtype=torch.long)))
    result["mean"] = _always(lens.mean.expand_as(a_BD))
    return result


def read_by_lens(lens: ConsistencyLens, texts: list[str]) -> Rebuild:
    """What the reconstructor makes of strings."""
    a_hat_BD = lens.reconstruct(*pad(to_ids(lens.tokenizer, texts)))
    return Rebuild(a_hat_BD, torch.tensor([not is_text(text) for text in texts], device=a_hat_BD.device))


def read_by_subject(lens: ConsistencyLens, texts: list[str]) -> Rebuild:
    """The untouched subject's own residual at the last token of strings, nothing before them but what its tokenizer always puts there."""
    ids_BT, lengths_B = pad(encode(lens.tokenizer, texts))
    failed_B = torch.tensor([not is_text(text) for text in texts]) | (lengths_B == 0)
    ids_BT = ids_BT if ids_BT.shape[1] else ids_BT.new_zeros(len(texts), 1)
    resid_BTD = lens.subject.residual(ids_BT.to(lens.mean.device))
    last_B = (lengths_B - 1).clamp_min(0).to(resid_BTD.device)
    a_hat_BD = resid_BTD[torch.arange(len(texts), device=resid_BTD.device), last_B].float()
    return Rebuild(a_hat_BD, failed_B.to(a_hat_BD.device))


def context_tails(tokenizer, input_ids_BC: Tensor, position_B: Tensor, count: int) -> list[str]:
    """The last ``count`` tokens of each context up to P, as text."""
    contexts = [row[: p + 1][-count:] for row, p in zip(input_ids_BC.tolist(), position_B.tolist(), strict=True)]
    return tokenizer.batch_decode(contexts, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def partners(doc_ids: np.ndarray) -> np.ndarray:
    """For each row the number of a row of another document, each row serving once ``[N]``.

    Rows are put in order of their documents and turned by half their number: where no document holds more than half of the rows, none
    meets its own.
    """
    order = np.argsort(doc_ids, kind="stable")
    result = np.empty_like(order)
    result[order] = np.roll(order, len(order) // 2)
    return result


def _always(a_hat_BD: Tensor) -> Rebuild:
    return Rebuild(a_hat_BD.float(), torch.zeros(len(a_hat_BD), dtype=torch.bool, device=a_hat_BD.device))
