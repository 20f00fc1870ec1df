"""Statistics of the activations that a lens is trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Of the activations a lens was trained on, float32 ``[D]``: per-dimension mean and variance, and the mean of the unit-length ones."""

    mean: Tensor
    var: Tensor
    mean_normalised: Tensor

    @classmethod
    def of(cls, reader) -> Statistics:
        """From whatever has the three as attributes: the training dump's reader."""
        return cls(*(torch.as_tensor(getattr(reader, field.name)).float() for field in dataclasses.fields(cls)))
