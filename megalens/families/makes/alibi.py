"""Makes whose attention is biased towards near keys (ALiBi) in place of turning queries and keys: BLOOM, MPT, some of Falcon."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from megalens.families.protocol import Family, Settings
from megalens.families.registry import register


def slopes(heads: int, device: torch.device) -> Tensor:
    """How much each head's score falls per position, ``[heads]``."""
    return build_alibi_tensor(torch.ones(1, 2, dtype=torch.long, device=device), heads, torch.float32)[:, 0, 1]


def alibi(heads: int, key_positions: Tensor) -> Tensor:
    """``[1 or B, heads, 1, K]``: what is added to the scores of each key; only differences between keys count."""
    return slopes(heads, key_positions.device)[:, None, None] * key_positions[:, None, None]


@register("bloom")
class Bloom(Family):
    """BLOOM: embeddings are normed before the first block."""

    positional_argument = "alibi"

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """The norm of the embeddings."""
        return cast(nn.Module, self.base.word_embeddings_layernorm)(embeds_BSD)

    def positional(self, hidden: Tensor, positions: Tensor, key_positions: Tensor, kinds: set[str]) -> dict:
        """``[B * heads, 1, K]``."""
        biases = alibi(self.config.n_head, key_positions).expand(hidden.shape[0], -1, -1, -1)
        return dict.fromkeys(kinds, biases.flatten(0, 1).to(hidden.dtype))


@register("mpt")
class MPT(Family):
    """MPT: one bias for all rows, counted in keys; a mask that is true where nothing is seen."""

    positional_argument = "position_bias"
    counts_keys = True

    @staticmethod
    def attention(config: Settings) -> str:
        """Plain attention, the only one there is."""
        return "eager"

    def positional(self, hidden: Tensor, positions: Tensor, key_positions: Tensor, kinds: set[str]) -> dict:
        """``[heads, 1, longest text]``, of which the attention takes the last K."""
        build = cast(Any, self.base).build_mpt_alibi_tensor
        return dict.fromkeys(kinds, build(self.config.n_heads, self.config.max_seq_len, device=hidden.device))

    def mask(self, allowed_B1SK: Tensor, dtype: torch.dtype) -> Tensor:
        """True where nothing is seen."""
        return ~allowed_B1SK


@register("falcon")
class Falcon(Family):
    """Falcon: rotary embeddings, or (Falcon RW) ALiBi within the mask."""

    needs_mask = True

    def positional(self, hidden: Tensor, positions: Tensor, key_positions: Tensor, kinds: set[str]) -> dict:
        """Biases (or None) and rotary embeddings."""
        biases = alibi(self.config.num_attention_heads, key_positions).to(hidden.dtype) if self.config.alibi else None
        return dict.fromkeys(kinds, (biases, cast(nn.Module, self.base.rotary_emb)(hidden, positions)))

    def call_block(
        self, block: nn.Module, hidden_BSD: Tensor, mask: Tensor | None, positions: Tensor, positional: Any, cache: Any
    ) -> Tensor:
        """The block's mask has the biases in it."""
        (biases, rotary), options = positional, {"layer_past": cache, "use_cache": cache is not None, "position_ids": positions}
        if biases is not None and mask is not None:
            scale = (self.config.hidden_size // self.config.num_attention_heads) ** 0.5
            hidden = mask.logical_not() if mask.dtype == torch.bool else mask < -1
            mask = (biases / scale).expand(len(hidden), -1, hidden.shape[2], -1)
            mask = mask.masked_fill(hidden, torch.finfo(hidden_BSD.dtype).min)
        return block(hidden_BSD, alibi=biases, attention_mask=mask, position_embeddings=rotary, **options)[0]
