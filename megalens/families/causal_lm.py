"""One way to walk through a Hugging Face causal LM, whatever its family: embedding, numbered blocks, final norm, vocabulary.

The blocks are the library's own modules, called with explicit positions, masks and key-value cache; what differs between families
(names, learned positions, soft-caps, embedding scale, sliding windows, several rotary bases) is settled here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalens.config import ConfigError
from megalens.families.cache import KVCache, joined


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its parts, as attribute names of the base model (and the block's name for its cache)."""

    blocks: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    learned_positions: str | None = None
    cache_argument: str = "past_key_values"


FAMILIES = {
    "gpt2": Family(blocks="h", embedding="wte", norm="ln_f", learned_positions="wpe"),
    "gpt_neox": Family(embedding="embed_in", norm="final_layer_norm", cache_argument="layer_past"),
}


def _call_block(block, hidden_BSD, mask, positions, rotary, argument: str, cache: KVCache | None, index: int) -> Tensor:
    return block(
        hidden_BSD,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=rotary,
        use_cache=cache is not None,
        **{argument: cache},
    )


def _call_block_alone(block, hidden_BSD, mask, positions, rotary, argument: str, cached: bool, past) -> tuple[Tensor, tuple | None]:
    """The same with one block's own keys and values as arguments: a function of tensors, one graph for all blocks."""
    cache = _OneBlock(past) if cached else None
    hidden_BSD = _call_block(block, hidden_BSD, mask, positions, rotary, argument, cache, 0)
    return hidden_BSD, cache.stored if cached else None


class _OneBlock:
    """A cache of whichever block calls it."""

    def __init__(self, past: tuple[Tensor, Tensor] | None):
        self.stored = past

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.stored = (key, value) if self.stored is None else joined(self.stored, (key, value))
        return self.stored


class Vocabulary(nn.Module):
    """The output and input embedding matrices as one module, so that sharded engines gather them around a vocabulary operation.

    Called with a function of ``(out_weight_VD, in_weight_VD, bias_V or None)`` that returns a tensor or a tuple of tensors.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        head = model.get_output_embeddings()
        self.out_weight = head.weight
        self.in_weight = model.get_input_embeddings().weight
        self.bias = getattr(head, "bias", None)

    def forward(self, use: Callable):
        return use(self.out_weight, self.in_weight, self.bias)


class CausalLM(nn.Module):
    """The parts of a causal LM, addressed by block number.

    Args:
        model: a Hugging Face causal LM of the Llama / Qwen / Mistral / Gemma / GPT-2 / GPT-NeoX kind.

    Raises:
        ConfigError: a model of another make.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config
        self.family = FAMILIES.get(self.config.model_type, Family())
        base = model.base_model
        missing = [name for name in (self.family.blocks, self.family.embedding, self.family.norm) if not hasattr(base, name)]
        if missing:
            raise ConfigError(f"models of type '{self.config.model_type}' are not known: {type(base).__name__} has no {missing[0]}")
        self.vocabulary = Vocabulary(model)
        self.adapted: list[nn.Module] = []  # layers that carry adapters
        self.call_block = _call_block
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self.eager = self.config._attn_implementation == "eager"
        rotary = getattr(base, "rotary_emb", None)
        self.rotary_by_type = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        for module in model.modules():  # the base is never trained with dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0

    @property
    def base(self) -> nn.Module:
        """The model without its vocabulary head."""
        return self.model.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return getattr(self.base, self.family.blocks)

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.vocabulary.in_weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings ``[..., D]`` as the first block expects them (Gemma's scale included), without learned positions."""
        return getattr(self.base, self.family.embedding)(ids)

    @property
    def embed_scale(self) -> float | Tensor:
        """What the family multiplies rows of the embedding matrix with (sqrt(d) for Gemma, else 1)."""
        return getattr(getattr(self.base, self.family.embedding), "embed_scale", 1.0)

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before block 0: embeddings plus learned positions, where the family has them."""
        if self.family.learned_positions is None:
            return embeds_BSD
        return embeds_BSD + getattr(self.base, self.family.learned_positions)(positions)

    def run(
        self,
        hidden_BSD: Tensor,
        first: int,
        last: int,
        positions: Tensor,
        key_positions: Tensor | None = None,
        cache: KVCache | None = None,
        own: dict[int, nn.Module] | None = None,
    ) -> Tensor:
        """Blocks ``first .. last - 1`` over the residual stream.

        Args:
            hidden_BSD: residual stream before block ``first``.
            positions: ``[1 or B, S]`` position of each query in its sequence.
            key_positions: ``[1 or B, K]`` position of each key, cached ones first; a key is seen by queries at its position or
                later, and never when its position is negative. None: the cached ones are positions 0, 1, ... and the queries follow.
            cache: earlier keys and values of these blocks; appended to.
            own: modules to use in place of the model's own blocks.
        """
        rotary = self._rotary(hidden_BSD, positions)
        cached = cache.length(first) if cache is not None and first < last else 0
        kinds = {self._kind(i) for i in range(first, last)}
        masks = {kind: self._mask(kind, positions, key_positions, cached, hidden_BSD.dtype) for kind in kinds}
        for index in range(first, last):
            block = own[index] if own and index in own else self.blocks[index]
            kind = self._kind(index)
            turned = rotary[kind] if self.rotary_by_type else rotary
            hidden_BSD = self.call_block(block, hidden_BSD, masks[kind], positions, turned, self.family.cache_argument, cache, index)
        return hidden_BSD

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run the blocks through ``torch.compile``: one graph for all blocks of a kind of call, whatever the batch and the lengths."""
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a block's number must not make a graph of its own
        compiled = torch.compile(_call_block_alone, backend=backend, recompile_limit=64, isolate_recompiles=True)

        def call(block, hidden_BSD, mask, positions, rotary, argument, cache, index) -> Tensor:
            past = None if cache is None else cache.stored.get(index)
            hidden_BSD, stored = compiled(block, hidden_BSD, mask, positions, rotary, argument, cache is not None, past)
            if cache is not None:
                cache.stored[index] = stored
            return hidden_BSD

        self.call_block = call

    def slicing(self, ranks: int) -> dict[str, str]:
        """How ranks can slice a block's layers among them: ``colwise``, ``rowwise`` or ``heads`` by path within the block.

        Where a module's layers are sliced by their outputs, all of its layers are sliced: none reads their input whole.

        Raises:
            ConfigError: transformers has no such plan for the family, or the heads can not be shared evenly.
        """
        plan = getattr(self.config, "base_model_tp_plan", None) or {}
        kinds = {"colwise": "colwise", "rowwise": "rowwise", "replicated_with_grad_allreduce": "heads"}
        prefix = f"{self.family.blocks}.*."
        found = {path.removeprefix(prefix): kinds.get(kind) for path, kind in plan.items() if path.startswith(prefix)}
        parents = {path.rpartition(".")[0] for path, kind in found.items() if kind == "colwise"}
        layers = {f"{parent}.{name}" for parent in parents for name in _matrices(self.blocks[0].get_submodule(parent))}
        if not found or None in found.values() or not layers <= found.keys():
            raise ConfigError(f"models of type '{self.config.model_type}' can not be sliced; set fsdp.tensor_ranks=1")
        heads = self.config.num_attention_heads, getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        if any(count % ranks for count in heads):
            raise ConfigError(
                f"fsdp.tensor_ranks={ranks} must divide the model's {heads[0]} attention heads and {heads[1]} key-value heads"
            )
        return found

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the vocabulary head reads."""
        return getattr(self.base, self.family.norm)(hidden)

    def logits(self, normed: Tensor) -> Tensor:
        """Next-token logits in float32 (float64 stays), soft-cap included, from :meth:`final_norm`'s output."""
        logits = self.vocabulary(lambda out, _, bias: nn.functional.linear(normed, out, bias))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _kind(self, block: int) -> str:
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return types[block]
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"

    def _rotary(self, hidden: Tensor, positions: Tensor):
        rotary = getattr(self.base, "rotary_emb", None)
        if rotary is None:
            return None
        if self.rotary_by_type:
            return {kind: rotary(hidden, positions, kind) for kind in set(self.config.layer_types)}
        return rotary(hidden, positions)

    def _mask(self, kind: str, positions: Tensor, key_positions: Tensor | None, cached: int, dtype: torch.dtype) -> Tensor | None:
        """``[1 or B, 1, S, K]``, or None where the attention's own causal rule (or no rule at all) says the same."""
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"attention of type '{kind}' (model type '{self.config.model_type}') is not known")
        window = self.config.sliding_window if kind == "sliding_attention" else None
        queries = positions.shape[-1]
        if key_positions is None:
            reach = cached + queries
            if (window is None or window >= reach) and (queries == 1 or (cached == 0 and not self.eager)):
                return None
            key_positions = positions if cached == 0 else torch.arange(reach, device=positions.device)[None]
        keys, queries = key_positions[:, None, :], positions[:, :, None]
        allowed = (keys <= queries) & (keys >= 0)
        if window is not None:
            allowed &= keys > queries - window
        allowed = allowed[:, None]
        if self.eager:
            return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
        return allowed


def _matrices(module: nn.Module) -> list[str]:
    """Names of the linear layers directly in a module."""
    return [name for name, layer in module.named_children() if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]


# ------------------------------------------------------------------------------------------------------------ adapters
