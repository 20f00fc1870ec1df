"""gpt-oss: attention sinks, which only transformers' plain attention has."""

from megalens.families.protocol import Family, Settings
from megalens.families.registry import register


@register("gpt_oss")
class GPTOSS(Family):
    """gpt-oss."""

    @staticmethod
    def attention(config: Settings) -> str:
        """Plain attention: it alone adds the sinks."""
        return "eager"
