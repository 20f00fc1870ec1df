"""GPT-2: learned positions, no rotary embedding."""

from typing import cast

from torch import Tensor, nn

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("gpt2")
class GPT2(Family):
    """GPT-2 and its relatives (DistilGPT-2, GPT-SW3)."""

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Adds the learned embedding of each position."""
        return embeds_BSD + cast(nn.Module, self.base.wpe)(positions)
