"""OPT and its kin: positions learned or drawn as sines, added to the embeddings by a module of the base model."""

from typing import Any, cast

from torch import Tensor, nn

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("opt")
class OPT(Family):
    """OPT. The one with post-norm blocks and projected embeddings (350M) has no final norm and is refused."""

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Adds the learned embedding of each position."""
        return embeds_BSD + cast(nn.Module, self.base.embed_positions)(None, position_ids=positions)


@register("biogpt")
class BioGPT(OPT):
    """BioGPT: embeddings scaled by their own module."""

    @property
    def embed_scale(self) -> float:
        """sqrt(D), where the configuration says so."""
        return cast(float, self.embedding.embed_scale)


@register("xglm")
class XGLM(BioGPT):
    """XGLM: positions as sines."""

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Adds the sines of each position."""
        return embeds_BSD + cast(nn.Module, self.base.embed_positions)(positions, 0)

    def call_block(self, block: nn.Module, hidden_BSD: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        """The mask must be as wide as the batch."""
        wide = mask if mask is None else mask.expand(hidden_BSD.shape[0], -1, -1, -1)
        return super().call_block(block, hidden_BSD, wide, *rest)


@register("ctrl")
class CTRL(Family):
    """CTRL: embeddings multiplied outside the embedding, positions as sines in a buffer."""

    @property
    def embed_scale(self) -> float:
        """sqrt(D)."""
        return self.config.n_embd**0.5

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix, multiplied outside the embedding."""
        return self.embedding(ids) * self.embed_scale

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """Adds the sines of each position."""
        return embeds_BSD + cast(Tensor, self.base.pos_encoding).to(embeds_BSD)[positions]
