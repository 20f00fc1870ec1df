"""Doge: adds to a mask of its own, which it takes for the causal one where it is given none."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("doge")
class Doge(Family):
    """Doge."""

    needs_mask = True
