"""Makes that differ from Llama only in how they ask for rotary embeddings."""

from typing import cast

from torch import Tensor, nn

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("olmo3", "mellum", "laguna", "mimo_v2_flash", "lfm3")
class RotaryPerKind(Family):
    """OLMo 3, Mellum, Laguna, MiMo V2 Flash and LFM 3."""

    rotary_per_kind = True


@register("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text")
class ThreePositions(Family):
    """Text models of Qwen2-VL, Qwen2.5-VL and GLM-4V: a token of text stands at the same place on all three axes of an image."""

    def positional(self, hidden: Tensor, positions: Tensor, key_positions: Tensor, kinds: set[str]) -> dict:
        """Rotary embeddings of three positions a token."""
        return dict.fromkeys(kinds, cast(nn.Module, self.base.rotary_emb)(hidden, positions[None].expand(3, *positions.shape)))
