"""gpt-oss: attention sinks, which only transformers' plain attention has."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("gpt_oss")
class GPTOSS(Family):
    """gpt-oss."""

    @staticmethod
    def attention(config) -> str:
        """Plain attention: it alone adds the sinks."""
        return "eager"
