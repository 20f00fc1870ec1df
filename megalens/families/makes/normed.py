"""Makes that norm the stream where others do not: before the first block, or in the vocabulary head."""

from functools import cached_property
from typing import cast

from torch import Tensor, nn

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("nanochat")
class NanoChat(Family):
    """nanochat: its final norm, which has no weights, norms the embeddings too; soft-capped logits."""

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Normed embeddings."""
        return self.norm(embeds_BSD)

    @property
    def softcap(self) -> float | None:
        """The configuration's cap of the logits."""
        return self.config.final_logit_softcapping


@register("modernbert-decoder")
class ModernBertDecoder(Family):
    """ModernBERT as a decoder: normed embeddings, a dense layer between final norm and vocabulary."""

    rotary_per_kind = True

    @cached_property
    def base(self) -> nn.Module:
        """The model; what transformers calls the decoder is its vocabulary matrix."""
        return cast(nn.Module, self.model.model)

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Normed embeddings."""
        return cast(nn.Module, self.base.embeddings)(inputs_embeds=embeds_BSD)

    @cached_property
    def norm(self) -> nn.Module:
        """Final norm and the head's layer."""
        return nn.Sequential(cast(nn.Module, self.base.final_norm), cast(nn.Module, self.model.lm_head))
