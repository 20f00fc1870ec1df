"""Makes that differ from Llama only in having one rotary embedding per kind of attention."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("olmo3", "mellum", "laguna")
class RotaryPerKind(Family):
    """OLMo 3, Mellum and Laguna."""

    rotary_per_kind = True
