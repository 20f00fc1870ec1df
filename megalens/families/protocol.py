"""What the walk asks of a make of models. The answers here fit most; a make that differs gives its own in one file of ``makes/``."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Settings = Any
"""A model's configuration, of transformers. Each make's is a class of its own, so no type says what is in it."""

KINDS = {
    "full_attention": "keys",
    "attention": "keys",
    "indexed_attention": "keys",
    "sliding_attention": "keys in a window",
    "chunked_attention": "keys in a chunk",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
    "hybrid": "keys and state",
    "mlp": "nothing",
    "moe": "nothing",
}
"""Kinds of blocks, and what each keeps of the text that it has read."""
_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class Family:
    """One model as its make lays it out.

    The walk (:class:`~megalens.families.causal_lm.CausalLM`) knows a model by these answers only. A make overrides what differs.

    Args:
        model: a causal LM of transformers.
    """

    blocks_names: tuple[str, ...] = ("layers", "h", "blocks")
    """Attributes of the base model that may be its decoder blocks."""
    norm_names: tuple[str, ...] = (
        "norm",
        "ln_f",
        "norm_f",
        "final_layernorm",
        "final_layer_norm",
        "layer_norm",
        "layernorm",
        "embedding_norm",
    )
    """Attributes of the base model that may be its final norm."""
    positional_argument = "position_embeddings"
    """Argument by which a block is told what :meth:`positional` gives."""
    rotary_per_kind = False
    """Whether each kind of attention turns by a rotary embedding of its own."""

    uncalled: tuple[str, ...] = ()
    """Names of layers, or of what holds them, that are read without a call or called without a gradient: LoRA there would do nothing."""
    one_by_one = False
    """Whether blocks that keep a state can go on from it by one token at a time only."""

    counts_keys = False
    """Whether attention counts keys, where others look at their positions: then a row's keys must end where its queries begin."""
    needs_mask = False
    """Whether blocks must be given a mask where their own causal rule would do."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.config: Settings = model.config.get_text_config()
        self.blocks_name = next((name for name in self.blocks_names if hasattr(self.base, name)), self.blocks_names[0])
        self.norm_name = next((name for name in self.norm_names if hasattr(self.base, name)), self.norm_names[0])
        blocks: Any = getattr(self.base, self.blocks_name, ())
        parameters = inspect.signature(blocks[0].forward).parameters if len(blocks) else {}
        self.cache_argument = next((name for name in _CACHE_ARGUMENTS if name in parameters), _CACHE_ARGUMENTS[0])
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self.arguments = None if takes_all else frozenset(parameters)

    @staticmethod
    def attention(config: Settings) -> str | None:
        """Which of transformers' attention functions gives what the make means; None: the one that transformers chooses.

        Fused ones leave a soft-cap of the scores out.
        """
        return "eager" if getattr(config, "attn_logit_softcapping", None) else None

    # --------------------------------------------------------------------------------------------------------- parts

    @cached_property
    def base(self) -> nn.Module:
        """The model of text that has the blocks: without its vocabulary head, and without what reads images or sound."""
        found = [self.model.get_decoder()] if hasattr(self.model, "get_decoder") else []
        found += [self.model.base_model, getattr(self.model, "model", self.model)]
        return next((part for part in found if any(hasattr(part, name) for name in self.blocks_names)), found[0])

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return getattr(self.base, self.blocks_name)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return getattr(self.base, self.norm_name, cast(nn.Module, None))  # missing() says so

    def missing(self) -> str | None:
        """The first part that the model does not have; None: all are there."""
        if not isinstance(getattr(self.base, self.blocks_name, None), nn.ModuleList):
            return f"list of blocks named {' or '.join(self.blocks_names)}"
        if self.norm is None:
            return f"final norm named {', '.join(self.norm_names[:-1])} or {self.norm_names[-1]}"
        return None if getattr(self.model.get_output_embeddings(), "weight", None) is not None else "vocabulary head"

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
        """The kind of a block, one of :data:`KINDS`; the walk refuses others."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return types[block]
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"

    def window(self, kind: str) -> int | None:
        """How many positions a query of this kind sees, its own among them; None: all before it."""
        return self.config.sliding_window if KINDS[kind] == "keys in a window" else None

    def chunk(self, kind: str) -> int | None:
        """How long the chunks are out of which a query of this kind does not see; None: there are none."""
        return self.config.attention_chunk_size if KINDS[kind] == "keys in a chunk" else None

    def keeps_state(self, kind: str) -> bool:
        """Whether a block of this kind keeps a state, so that nothing that it has read can be hidden again."""
        return "state" in KINDS[kind]

    def positional(self, hidden: Tensor, positions: Tensor, key_positions: Tensor, kinds: set[str]) -> dict:
        """What blocks of each kind are told of positions besides ``position_ids``: rotary embeddings, biases, or None.

        Args:
            positions: ``[1 or B, S]`` of the queries.
            key_positions: ``[1 or B, K]`` of the keys, cached ones first.
        """
        rotary = getattr(self.base, "rotary_emb", getattr(self.base, "pos_emb", None))
        if rotary is None:
            return dict.fromkeys(kinds)
        if self.rotary_per_kind:
            return {kind: None if KINDS[kind] == "state" else rotary(hidden, positions, kind) for kind in kinds}
        return dict.fromkeys(kinds, rotary(hidden, positions))

    @property
    def longest(self) -> int | None:
        """Tokens up to which a position means the same in every text; None: always. Some rotary embeddings depend on the last position."""
        turns, whole = getattr(self.config, "rope_parameters", None) or {}, getattr(self.config, "max_position_embeddings", None)
        return {"longrope": turns.get("original_max_position_embeddings"), "dynamic": whole}.get(str(turns.get("rope_type")))

    def mask(self, allowed_B1SK: Tensor, dtype: torch.dtype) -> Tensor:
        """Which keys each query sees, as the make's attention wants to be told: booleans, or numbers to add to the scores."""
        if self.config._attn_implementation != "eager":
            return allowed_B1SK
        return torch.zeros(allowed_B1SK.shape, dtype=dtype, device=allowed_B1SK.device).masked_fill(~allowed_B1SK, torch.finfo(dtype).min)

    def call_block(
        self, block: nn.Module, hidden_BSD: Tensor, mask: Tensor | None, positions: Tensor, positional: Any, cache: Any
    ) -> Tensor:
        """The residual stream after a block; ``cache`` (or None) takes its keys and values by ``update``.

        Args:
            mask: what :meth:`mask` gives; None where the causal rule says the same. For blocks that keep a state ``[B, S]``, false
                where there is padding. For blocks that keep both, both.
            positional: what :meth:`positional` gives for the block's kind.
        """
        offered = {
            "attention_mask": mask,
            "position_ids": positions,
            self.positional_argument: positional,
            self.cache_argument: cache,
            "use_cache": cache is not None,
        }
        out = block(hidden_BSD, **{name: value for name, value in offered.items() if self.arguments is None or name in self.arguments})
        return out[0] if isinstance(out, tuple) else out

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
