"""Makes that multiply embeddings and logits by numbers of the configuration, beside Granite."""

from typing import Any

from torch import Tensor, nn

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("minicpm3")
class MiniCPM(Family):
    """MiniCPM 3."""

    @property
    def embed_scale(self) -> float:
        """The configuration's ``scale_emb``."""
        return self.config.scale_emb

    @property
    def logit_scale(self) -> float:
        """One over the configuration's ``logits_scaling``."""
        return 1.0 / self.config.logits_scaling


@register("falcon_h1")
class FalconH1(Family):
    """Falcon H1: each block has attention and Mamba side by side."""

    def kind(self, block: int) -> str:
        """All blocks are alike."""
        return "hybrid"

    @property
    def embed_scale(self) -> float:
        """The configuration's ``embedding_multiplier``."""
        return self.config.embedding_multiplier

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix, multiplied outside the embedding."""
        return self.embedding(ids) * self.embed_scale

    @property
    def logit_scale(self) -> float:
        """The configuration's ``lm_head_multiplier``."""
        return self.config.lm_head_multiplier

    def call_block(self, block: nn.Module, hidden_BSD: Tensor, mask: Any, positions: Tensor, positional: Any, cache: Any) -> Tensor:
        """Keys and padding are masked apart."""
        keys, padding = mask
        return block(
            hidden_BSD,
            attention_mask=keys,
            mamba_attention_mask=padding,
            position_ids=positions,
            position_embeddings=positional,
            past_key_values=cache,
            use_cache=cache is not None,
        )[0]
