"""Makes that choose which keys each query sees (DeepSeek's sparse attention): they choose by the mask, so they always need one."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4")
class Indexed(Family):
    """DeepSeek V3.2, GLM 5 and their kin."""

    needs_mask = True
    uncalled = ("indexer",)
