"""Makes with Mamba's first selective scan, which cannot start from a state."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("mamba", "falcon_mamba", "jamba")
class Mamba(Family):
    """Mamba, Falcon Mamba, and Jamba's mixture of Mamba and attention."""

    one_by_one = True
    uncalled = ("dt_proj",)
