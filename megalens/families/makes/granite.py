"""Granite: embeddings multiplied, logits divided, by numbers of the configuration (the blocks scale their own residuals)."""

from torch import Tensor

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("granite", "granitemoe", "granitemoeshared")
class Granite(Family):
    """Granite, dense or with experts."""

    @property
    def embed_scale(self) -> float:
        """The configuration's ``embedding_multiplier``."""
        return self.config.embedding_multiplier

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix, multiplied outside the embedding."""
        return self.embedding(ids) * self.embed_scale

    @property
    def logit_scale(self) -> float:
        """One over the configuration's ``logits_scaling``."""
        return 1.0 / self.config.logits_scaling


@register("hyperclovax")
class HyperClovaX(Granite):
    """HyperCLOVA X: Granite whose ``logits_scaling`` multiplies."""

    @property
    def logit_scale(self) -> float:
        """The configuration's ``logits_scaling``."""
        return self.config.logits_scaling
