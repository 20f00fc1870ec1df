"""Llama 4: blocks without positions scale their queries by where they stand in the cache, beyond so many tokens."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("llama4_text")
class Llama4(Family):
    """The text model of Llama 4."""

    @property
    def longest(self) -> int | None:
        """Tokens up to which the scale is 1."""
        return int(self.config.floor_scale) - 1 if self.config.attn_temperature_tuning else super().longest
