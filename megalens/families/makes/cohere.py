"""Cohere (Command R): logits multiplied by a number of the configuration."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("cohere", "cohere2", "cohere2_moe")
class Cohere(Family):
    """Command R and its successors."""

    @property
    def logit_scale(self) -> float:
        """The configuration's ``logit_scale``."""
        return self.config.logit_scale
