"""A batch of activations: what a loader hands out and a lens is given."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """Rows of a dump, or of several.

    ``activation [B, d]`` float32; left out where the lens shall read it from the subject itself. ``input_ids [B, C]``: the context's
    tokens 0 to P, 0 behind them. ``position [B]``: P. ``sample_id [B]``: the row's number. ``doc_id [B]``: its document. Of a mixture of
    dumps also ``layer [B]`` and ``source [B]``, the dump's number. Where texts are given, ``text_ids [B, W]``, right-padded,
    ``text_length [B]``, and ``text_weight [B, W]`` float32 where tokens weigh differently. All but activation and weights are int64.
    """

    activation: Tensor
    input_ids: Tensor
    position: Tensor
    sample_id: Tensor
    doc_id: Tensor
    layer: Tensor
    source: Tensor
    text_ids: Tensor
    text_length: Tensor
    text_weight: Tensor
