"""What the walk asks of a make of models. The answers here are Llama's; a make that differs gives its own in one file of ``makes/``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

Settings = Any
"""A model's configuration, of transformers. Each make's is a class of its own, so no type says what is in it."""


class Family:
    """One model as its make lays it out.

    The walk (:class:`~megalens.families.causal_lm.CausalLM`) knows a model by these answers only. A make overrides what differs.

    Args:
        model: a causal LM of transformers.
    """

    blocks_name = "layers"
    """Attribute of the base model: its decoder blocks."""
    embedding_name = "embed_tokens"
    """Attribute of the base model: its token embedding."""
    norm_name = "norm"
    """Attribute of the base model: its final norm."""
    cache_argument = "past_key_values"
    """Argument by which a block takes its key-value cache."""
    rotary_per_kind = False
    """Whether each kind of attention turns by a rotary embedding of its own."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config: Settings = model.config.get_text_config()

    @staticmethod
    def attention(config: Settings) -> str:
        """Which of transformers' attention functions gives what the make means; fused ones leave a soft-cap of the scores out."""
        return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"

    # --------------------------------------------------------------------------------------------------------- parts

    @property
    def base(self) -> nn.Module:
        """The model without its vocabulary head."""
        return self.model.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return getattr(self.base, self.blocks_name)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return getattr(self.base, self.embedding_name)

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return getattr(self.base, self.norm_name)

    def missing(self) -> str | None:
        """The first part that the model does not have under its name; None: all are there."""
        names = (self.blocks_name, self.embedding_name, self.norm_name)
        return next((name for name in names if not hasattr(self.base, name)), None)

    # -------------------------------------------------------------------------------------------- entering the stream

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings ``[..., D]``: rows of the embedding matrix times :attr:`embed_scale`."""
        return self.embedding(ids)

    @property
    def embed_scale(self) -> float | Tensor:
        """What :meth:`embed` multiplies rows of the embedding matrix by."""
        return 1.0

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before block 0 of what :meth:`embed` gives at ``positions`` ``[1 or B, S]``."""
        return embeds_BSD

    # -------------------------------------------------------------------------------------------------------- blocks

    def kind(self, block: int) -> str:
        """The kind of attention of a block: ``full_attention`` or ``sliding_attention``; the walk refuses others."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return types[block]
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"

    def window(self, kind: str) -> int | None:
        """How many positions a query of this kind sees, its own among them; None: all before it."""
        return self.config.sliding_window if kind == "sliding_attention" else None

    def rotary(self, hidden: Tensor, positions: Tensor, kinds: set[str]) -> dict:
        """What the blocks of each kind of attention turn queries and keys by; None where the make has no rotary embedding."""
        rotary = getattr(self.base, "rotary_emb", None)
        if rotary is None:
            return dict.fromkeys(kinds)
        if self.rotary_per_kind:
            return {kind: rotary(hidden, positions, kind) for kind in kinds}
        return dict.fromkeys(kinds, rotary(hidden, positions))

    @classmethod
    def call_block(cls, block: nn.Module, hidden_BSD: Tensor, mask: Tensor | None, positions: Tensor, rotary: Any, cache: Any) -> Tensor:
        """The residual stream after a block; ``cache`` (or None) takes its keys and values by ``update``."""
        return block(
            hidden_BSD,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotary,
            use_cache=cache is not None,
            **{cls.cache_argument: cache},
        )

    @property
    def tensor_parallel(self) -> dict[str, str]:
        """How transformers slices each layer among ranks, by path within the base model (blocks as ``*``); empty: it cannot."""
        return getattr(self.config, "base_model_tp_plan", None) or {}

    # ---------------------------------------------------------------------------------------------------- vocabulary

    @property
    def logit_scale(self) -> float:
        """What the head's output, its bias included, is multiplied by."""
        return 1.0

    @property
    def softcap(self) -> float | None:
        """The cap of the scaled logits, ``softcap * tanh(logits / softcap)``; None: none."""
        return None
