"""The walk through a causal LM of any make: embedding, numbered blocks, final norm, vocabulary.

The blocks are transformers' own modules, called with explicit positions, masks and key-value cache. What differs between makes is
asked of the model's :class:`~megalens.families.protocol.Family`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megalens.config import ConfigError
from megalens.families.cache import KVCache, joined
from megalens.families.protocol import KINDS
from megalens.families.registry import family_of


class _OneBlock:
    """A cache of whichever block calls it."""

    def __init__(self, past: tuple[Tensor, Tensor] | None):
        self.stored = past

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.stored = (key, value) if self.stored is None else joined(self.stored, (key, value))
        return self.stored


class Vocabulary(nn.Module):
    """The output and input embedding matrices as one module, so that sharded engines gather them around a vocabulary operation.

    Called with a function of ``(out_weight_VD, in_weight_VD, bias_V or None)`` that returns a tensor or a tuple of tensors. A logit
    scale is in the bias already; :meth:`CausalLM.final_norm` has it in what it gives.
    """

    bias: Tensor | None

    def __init__(self, model: PreTrainedModel, logit_scale: float = 1.0):
        super().__init__()
        self.logit_scale, head = logit_scale, model.get_output_embeddings()
        self.out_weight = head.weight
        self.in_weight = cast(nn.Embedding, model.get_input_embeddings()).weight
        self.bias = getattr(head, "bias", None)

    def forward(self, use: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
        """What ``use`` returns, called as the class says."""
        bias_V = self.bias
        if bias_V is not None and self.logit_scale != 1.0:
            bias_V = bias_V * self.logit_scale
        return use(self.out_weight, self.in_weight, bias_V)


class CausalLM(nn.Module):
    """A causal LM by its parts, which are addressed by block number.

    Args:
        model: a causal LM of transformers, of a registered make or laid out like Llama. Whether the walk computes what the model
            does is for :func:`megalens.families.self_check.check_walk` to say.

    Raises:
        ConfigError: a part is missing, or a block has attention of a kind that the walk has no mask for.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.family = family_of(model.config)(model)
        self.config = self.family.config
        refused = f"models of type '{self.config.model_type}' cannot be studied"
        if missing := self.family.missing():
            raise ConfigError(f"{refused}: {type(self.family.base).__name__} has no {missing}")
        self.kinds = [self.family.kind(block) for block in range(self.num_blocks)]
        if unknown := set(self.kinds) - KINDS.keys():
            raise ConfigError(f"{refused}: they have blocks of the kind '{min(unknown)}'")
        self.vocabulary = Vocabulary(model, self.family.logit_scale)
        self.adapted: list[Any] = []  # peft's layers that carry adapters
        self.softcap, self.longest = self.family.softcap, self.family.longest
        self._compiled_block: Callable[..., Tensor] | None = None  # what compile_blocks made
        self.eager = self.config._attn_implementation == "eager"
        for module in model.modules():  # the base is never trained with dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0  # type: ignore[assignment]  # nn.Module's stub knows tensors and modules only

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.family.blocks

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has, by its configuration."""
        return self.config.num_hidden_layers

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.family.norm

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.vocabulary.in_weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings ``[..., D]``, :attr:`embed_scale` included, without learned positions."""
        return self.family.embed(ids)

    @property
    def embed_scale(self) -> float | Tensor:
        """What :meth:`embed` multiplies rows of the embedding matrix by (sqrt(D) for Gemma, 1 for most)."""
        return self.family.embed_scale

    def enter(self, embeds_BSD: Tensor, positions: Tensor) -> Tensor:
        """The residual stream before block 0: embeddings, plus learned positions where the make has them."""
        return self.family.enter(embeds_BSD, positions)

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
            key_positions: ``[1 or B, K]`` position of each key, cached ones first. A key is seen by queries at its position or later,
                as far as the attention's window reaches, and by none when its position is negative. None: the cached keys are at
                positions 0, 1, ... and the queries follow them.
            cache: earlier keys and values of these blocks; appended to.
            own: modules to use in place of the model's own blocks.

        Raises:
            ConfigError: the text is longer than the make can be walked for.
        """
        kinds, blocks = set(self.kinds[first:last]), self.blocks
        cached = cache.length(first) if cache is not None and first < last else 0
        masks = {kind: self._mask(kind, positions, key_positions, cached, hidden_BSD.dtype) for kind in kinds}
        if key_positions is None:
            key_positions = _following(positions, cached)
        if key_positions.shape[-1] > (self.longest or key_positions.shape[-1]):
            raise ConfigError(
                f"models of type '{self.config.model_type}' place tokens otherwise in texts of more than {self.longest}; "
                "shorten them (activation_dumper.seq_len)"
            )
        positional = self.family.positional(hidden_BSD, positions, key_positions, kinds)
        if cache is not None:
            cache.batch = hidden_BSD.shape[0]
        for index in range(first, last):
            block = own[index] if own and index in own else blocks[index]
            kind = self.kinds[index]
            if cached and positions.shape[-1] > 1 and self.family.one_by_one and self.family.keeps_state(kind):
                hidden_BSD = self._one_by_one(block, hidden_BSD, masks[kind], positions, cache, index)
            else:
                hidden_BSD = self.call_block(block, hidden_BSD, masks[kind], positions, positional[kind], cache, index)
            if cache is not None:
                cache.lengths[index] = cached + positions.shape[-1]
        return hidden_BSD

    def _one_by_one(self, block: nn.Module, hidden_BSD: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, index: int) -> Tensor:
        """A block that keeps a state, called token by token."""
        each = range(positions.shape[-1])
        masks = [mask if mask is None else mask[:, i : i + 1] for i in each]
        places = [positions[:, i : i + 1] for i in each]
        return torch.cat([self.call_block(block, hidden_BSD[:, i : i + 1], masks[i], places[i], None, cache, index) for i in each], dim=1)

    def hides_keys(self, first: int, last: int) -> bool:
        """Whether what blocks ``first .. last - 1`` keep of a text can be hidden from later queries, token by token."""
        return not self.family.counts_keys and not self.keeps_state(first, last)

    def keeps_state(self, first: int, last: int) -> bool:
        """Whether one of blocks ``first .. last - 1`` keeps a state of what it has read."""
        return any(self.family.keeps_state(kind) for kind in self.kinds[first:last])

    def call_block(
        self,
        block: nn.Module,
        hidden_BSD: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        positional: Any,
        cache: KVCache | None,
        index: int,
    ) -> Tensor:
        """One block's call, compiled where :meth:`compile_blocks` was called."""
        if self._compiled_block is not None:
            return self._compiled_block(block, hidden_BSD, mask, positions, positional, cache, index)
        return self.family.call_block(block, hidden_BSD, mask, positions, positional, cache)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Run the blocks through ``torch.compile``: one graph for all blocks of a kind of call, whatever the batch and the lengths."""
        if self.keeps_state(0, self.num_blocks):
            raise ConfigError(f"models of type '{self.config.model_type}' keep states, which compiled blocks cannot; set compile=false")
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a block's number must not make a graph of its own
        call_block = self.family.call_block

        def alone(block, hidden_BSD, mask, positions, positional, cached: bool, past) -> tuple[Tensor, tuple | None]:
            """A call with the block's own keys and values as arguments: a function of tensors, one graph for all blocks."""
            cache = _OneBlock(past) if cached else None
            return call_block(block, hidden_BSD, mask, positions, positional, cache), None if cache is None else cache.stored

        options = {"recompile_limit": 64, "isolate_recompiles": True}
        compiled = torch.compile(alone, backend=backend, **options)  # type: ignore[call-overload]  # its overloads lack the two

        def call(block, hidden_BSD, mask, positions, positional, cache, index) -> Tensor:
            past = None if cache is None else cache.stored.get(index)
            hidden_BSD, stored = compiled(block, hidden_BSD, mask, positions, positional, cache is not None, past)
            if cache is not None:
                cache.stored[index] = stored
            return hidden_BSD

        self._compiled_block = call

    def slicing(self, ranks: int) -> dict[str, str]:
        """How ranks can slice a block's layers among them: ``colwise``, ``rowwise`` or ``heads`` by path within the block.

        Where a module's layers are sliced by their outputs, all of its layers are sliced: none reads their input whole.

        Raises:
            ConfigError: transformers cannot slice models of this type, or the heads cannot be shared evenly.
        """
        kinds = {"colwise": "colwise", "rowwise": "rowwise", "replicated_with_grad_allreduce": "heads"}
        prefix, layers = f"{self.family.blocks_name}.*.", self.family.tensor_parallel
        named = {path.removeprefix(prefix): kind for path, kind in layers.items() if path.startswith(prefix)}
        found = {path: kinds[kind] for path, kind in named.items() if kind in kinds}
        parents = {path.rpartition(".")[0] for path, kind in found.items() if kind == "colwise"}
        siblings = {f"{parent}.{name}" for parent in parents for name in _matrices(self.blocks[0].get_submodule(parent))}
        if not found or found.keys() < named.keys() or not siblings <= found.keys():
            raise ConfigError(f"models of type '{self.config.model_type}' cannot be sliced; set fsdp.tensor_ranks=1")
        heads = self.config.num_attention_heads, getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        if any(count % ranks for count in heads):
            raise ConfigError(
                f"fsdp.tensor_ranks={ranks} must divide the model's {heads[0]} attention heads and {heads[1]} key-value heads"
            )
        return found

    def final_norm(self, hidden: Tensor, norm: nn.Module | None = None) -> Tensor:
        """What vocabulary operations read: the normed hidden state, times the make's logit scale.

        ``scale * (hidden @ W.T)`` is ``(scale * hidden) @ W.T``, so that every operation on :attr:`vocabulary` is given the scale here.

        Args:
            norm: a norm to use in place of the model's own.
        """
        normed = (self.norm if norm is None else norm)(hidden)
        scale = self.vocabulary.logit_scale
        return normed if scale == 1.0 else normed * scale

    def logits(self, normed: Tensor) -> Tensor:
        """Next-token logits in float32 (float64 stays), soft-cap included, from :meth:`final_norm`'s output."""
        logits = self.vocabulary(lambda out, _, bias: nn.functional.linear(normed, out, bias))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _mask(self, kind: str, positions: Tensor, key_positions: Tensor | None, cached: int, dtype: torch.dtype) -> Any:
        """What blocks of a kind are told of what they must not see: a mask of keys, of padding, or both, as they keep keys or a state."""
        padding = None if key_positions is None else key_positions[:, -positions.shape[-1] :] >= 0
        if KINDS[kind] == "state":
            return padding
        keys = self._mask_of_keys(kind, positions, key_positions, cached, dtype)
        return (keys, padding) if KINDS[kind] == "keys and state" else keys

    def _mask_of_keys(self, kind: str, positions: Tensor, key_positions: Tensor | None, cached: int, dtype: torch.dtype) -> Tensor | None:
        """``[1 or B, 1, S, K]``, or None where the attention's own causal rule (or no rule at all) says the same."""
        count = positions.shape[-1]
        window, chunk = self.family.window(kind), self.family.chunk(kind)
        if key_positions is None:
            reach = cached + count
            is_whole = not self.family.needs_mask and (window is None or window >= reach) and (chunk is None or chunk >= reach)
            if is_whole and (count == 1 or (cached == 0 and not self.eager)):
                return None
            key_positions = _following(positions, cached)
        keys, queries = key_positions[:, None, :], positions[:, :, None]
        allowed = (keys <= queries) & (keys >= 0)
        if window is not None:
            allowed &= keys > queries - window
        if chunk is not None:
            allowed &= keys // chunk == queries // chunk
        return self.family.mask(allowed[:, None], dtype)


def _following(positions: Tensor, cached: int) -> Tensor:
    """Positions ``[1, K]`` of keys where the cached ones are at 0, 1, ... and the queries follow them."""
    return positions if cached == 0 else torch.arange(cached + positions.shape[-1], device=positions.device)[None]


def _matrices(module: nn.Module) -> list[str]:
    """Names of the linear layers directly in a module."""
    return [name for name, layer in module.named_children() if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]
