"""GPT-2 and its kin: learned positions, no rotary embedding."""

from typing import cast

from torch import Tensor, nn

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("gpt2", "gpt_bigcode")
class GPT2(Family):
    """GPT-2 and its relatives (DistilGPT-2, GPT-SW3), GPT-BigCode (StarCoder, SantaCoder)."""

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Adds the learned embedding of each position."""
        return embeds_BSD + cast(nn.Module, self.base.wpe)(positions)


@register("gpt_neo")
class GPTNeo(GPT2):
    """GPT-Neo: some blocks see a window, which they count in keys."""

    counts_keys = True
