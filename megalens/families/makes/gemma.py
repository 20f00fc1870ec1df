"""Gemma: embeddings scaled by their own module, soft-capped logits (2), one rotary embedding per kind of attention (3)."""

from typing import cast

from torch import Tensor

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("gemma", "gemma2", "vaultgemma")
class Gemma(Family):
    """Gemma 1 and 2, and VaultGemma."""

    @property
    def embed_scale(self) -> Tensor:
        """sqrt(D), rounded as the embedding rounds it when it multiplies."""
        return cast(Tensor, self.embedding.embed_scale)

    @property
    def softcap(self) -> float | None:
        """Gemma 2's cap of the logits."""
        return getattr(self.config, "final_logit_softcapping", None)


@register("gemma3_text", "gemma4_text", "gemma4_unified_text")
class Gemma3(Gemma):
    """The text models of Gemma 3 and 4. Those of Gemma 4 with embeddings of their own in each block are refused."""

    rotary_per_kind = True

    def missing(self) -> str | None:
        """A residual stream that is all there is: not with embeddings of their own, or keys of each other, in the blocks."""
        if getattr(self.config, "hidden_size_per_layer_input", None) or getattr(self.config, "num_kv_shared_layers", None):
            return "blocks that depend on the residual stream alone (they have embeddings of their own, or keys of other blocks)"
        return super().missing()
