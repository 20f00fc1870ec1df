"""The reconstructor: text in, activation out, through the subject's own first ``layer_l + 1`` blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from megalens.config import Config
from megalens.families.adapters import adapter, add_adapter
from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM
from megalens.lens.prompts import prompts_of
from megalens.lens.text import read_order
from megalens.lens.verbalizer import OwnBlocks, PromptEmbedding, StandardisedLinear


class Prefix(NamedTuple):
    """Beginnings of texts ``[G, P, D]``, in the order of reading, and for each text ``[B]`` which of them is its own."""

    embeds_GPD: Tensor
    group_B: Tensor


class LinearHead(nn.Module):
    """``W x``; W starts as the identity."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False, dtype=dtype)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]`` in float32 (float64 stays)."""
        made = self.linear(x.to(self.linear.weight.dtype))
        return made if made.dtype == torch.float64 else made.float()


class Reconstructor(nn.Module):
    """Rebuilds an activation from an explanation: prompt, text, suffix; the last position's residual; a head that starts as the identity.

    Args:
        lm: the subject's model, shared and frozen.
        tokenizer: the subject's.
        mean_D, var_D: statistics of the training activations.
    """

    lm: CausalLM
    suffix: PromptEmbedding | None

    def __init__(self, config: Config, lm: CausalLM, tokenizer: PreTrainedTokenizerBase, mean_D: Tensor, var_D: Tensor):
        super().__init__()
        self.__dict__["lm"] = lm  # shared: registered once, in the subject
        options, mode, self.last = config.reconstructor, config.mode_of("reconstructor"), config.layer_l + 1
        self.first_is_last = config.tail_order == "last_first"
        prompts = prompts_of(config, tokenizer)
        device = lm.vocabulary.in_weight.device
        self.length = len(prompts.before)
        self.prompt = PromptEmbedding(lm.embed(torch.tensor(prompts.before, device=device)))
        suffix = torch.tensor(prompts.suffix, device=device, dtype=torch.long)
        self.suffix = PromptEmbedding(lm.embed(suffix)) if prompts.suffix else None
        for part in filter(None, (self.prompt, self.suffix)):
            part.requires_grad_(options.trainable_prompt)
        std_D = var_D.clamp_min(1e-12).sqrt()
        affine = options.head == "affine"
        self.head = StandardisedLinear(mean_D, std_D, mean_D, std_D, lm.dtype) if affine else LinearHead(len(mean_D), lm.dtype)
        trained = range(self.last)
        self.own = OwnBlocks(lm.blocks, trained if mode == "full" else ())
        self.adapter = "reconstructor" if mode == "lora" else None
        lora = config.lora_of("reconstructor")
        self.adapter_parameters = add_adapter(lm, self.adapter, trained, lora, config.seed) if self.adapter else {}

    def forward(self, embeds_BTD: Tensor, lengths_B: Tensor | None = None, behind: Prefix | None = None) -> Tensor:
        """Rebuild activations ``[B, D]`` (float32) from text embeddings, right-padded to T.

        Args:
            embeds_BTD: embeddings of the text's tokens.
            lengths_B: tokens of each text, 0 allowed; None: all T.
            behind: beginnings that texts share, each run once; ``embeds_BTD`` are then the rest of the texts, in the order of reading.
        """
        batch, reach = embeds_BTD.shape[:2]
        if self.first_is_last and behind is None:
            embeds_BTD = read_order(embeds_BTD, lengths_B)
        if self.suffix is not None:
            embeds_BTD = _with_suffix(embeds_BTD, self.suffix(), lengths_B)
        last_B = torch.full((batch,), reach, device=embeds_BTD.device) if lengths_B is None else lengths_B
        last_B = last_B + (embeds_BTD.shape[1] - reach)
        with adapter(self.lm, self.adapter):
            hidden_BD = self._read(embeds_BTD, last_B, behind)
        return self.head(hidden_BD)

    def length_with(self, tokens: int) -> int:
        """Positions that a text of so many tokens takes, with the prompt and the suffix."""
        return self.length + tokens + (0 if self.suffix is None else len(self.suffix.weight))

    def _read(self, embeds_BSD: Tensor, last_B: Tensor, behind: Prefix | None) -> Tensor:
        """Residual stream after the last block, at the last position before the text (``last_B = 0``) or its ``last_B``-th token."""
        shared = 0 if behind is None else behind.embeds_GPD.shape[1]
        positions = torch.arange(self.length + shared + embeds_BSD.shape[1], device=embeds_BSD.device)[None]
        cache = KVCache()
        before = self._run(self.prompt(), positions[:, : self.length], cache)
        if behind is not None and shared:
            before = self._run(behind.embeds_GPD.to(before.dtype), positions[:, self.length : self.length + shared], cache)
            cache, before = cache.rows(behind.group_B), before[behind.group_B]
        hidden = before[:, -1:].expand(len(last_B), -1, -1)
        if embeds_BSD.shape[1]:
            text = self._run(embeds_BSD.to(hidden.dtype), positions[:, self.length + shared :], cache)
            hidden = torch.cat([hidden, text], dim=1)
        return hidden[torch.arange(len(last_B), device=hidden.device), last_B]

    def _run(self, embeds_BSD: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        own = {int(i): block for i, block in self.own.items()}
        return self.lm.run(self.lm.enter(embeds_BSD, positions), 0, self.last, positions, cache=cache, own=own)


def _with_suffix(embeds_BTD: Tensor, suffix_1SD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """``[B, T + S, D]``: the suffix right behind each text, padding last."""
    batch, reach, _ = embeds_BTD.shape
    joined = torch.cat([embeds_BTD, suffix_1SD.expand(batch, -1, -1).to(embeds_BTD.dtype)], dim=1)
    if lengths_B is None:
        return joined
    place = torch.arange(joined.shape[1], device=joined.device)[None]
    source = torch.where(place < lengths_B[:, None], place, (place - lengths_B[:, None] + reach).clamp_max(joined.shape[1] - 1))
    return joined.gather(1, source[..., None].expand(-1, -1, joined.shape[2]))
