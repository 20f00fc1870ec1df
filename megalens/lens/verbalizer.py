"""The verbalizer: an activation in, ``t_text`` tokens of text out, differentiable through the whole decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from megalens.config import Config
from megalens.families.adapters import adapter, add_adapter, without_adapters
from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM
from megalens.lens.prompts import end_id_of, prompts_of
from megalens.lens.sampling import ITS_OWN, Alone, Law, Ranks, Sampled, sample, score
from megalens.lens.text import Text, ended
from megalens.ops import LogProb, gumbel_embed


class OwnBlocks(nn.ModuleDict):
    """Copies of the subject's blocks, by their number, that a role trains for itself (mode full), without other roles' adapters.

    They stay as in evaluation (no dropout, no jitter of a router), so that a fresh role computes what the subject does.

    Args:
        blocks: the subject's.
        numbers: of those that are copied.
    """

    def __init__(self, blocks: nn.ModuleList, numbers: Iterable[int] = ()):
        super().__init__({str(i): without_adapters(deepcopy(blocks[i])) for i in numbers})
        self.requires_grad_(True)
        self.eval()

    def train(self, mode: bool = True) -> OwnBlocks:
        """Stay as in evaluation."""
        return super().train(False)


class PromptEmbedding(nn.Module):
    """Embeddings ``[L, D]`` of a prompt, trainable or not; a module so that sharded engines gather them."""

    def __init__(self, init_LD: Tensor):
        super().__init__()
        self.weight = nn.Parameter(init_LD.detach().clone())

    def forward(self) -> Tensor:
        """``[1, L, D]``."""
        return self.weight[None] * 1.0  # never the parameter itself: a sharded engine takes it away again


class StandardisedLinear(nn.Module):
    """``offset + scale * (W z + b)`` of ``z = (x - mean) / std``; W starts as the identity, b as 0.

    Standardising keeps the few dimensions of huge variance from drowning the rest. With ``offset = mean`` and ``scale = std``
    it starts as the identity.
    """

    mean: Tensor
    std: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, mean_D: Tensor, std_D: Tensor, offset_D: Tensor, scale_D: Tensor, dtype: torch.dtype):
        super().__init__()
        self.linear = nn.Linear(len(mean_D), len(mean_D), dtype=dtype)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for name, value in {"mean": mean_D, "std": std_D, "offset": offset_D, "scale": scale_D}.items():
            self.register_buffer(name, value.float().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]`` in float32 (float64 stays)."""
        wide = x if x.dtype == torch.float64 else x.float()
        z = self.linear(((wide - self.mean) / self.std).to(self.linear.weight.dtype))
        return self.offset + self.scale * z.to(wide.dtype)


class FixedNorm(nn.Module):
    """``norm * x / |x|``: an activation rescaled and not otherwise changed; 0 stays 0. It has no parameters."""

    def __init__(self, norm: float):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]`` in float32 (float64 stays)."""
        wide = x if x.dtype == torch.float64 else x.float()
        return wide * (self.norm / wide.norm(dim=-1, keepdim=True).clamp_min(1e-12))


class Draw(NamedTuple):
    """One token of every row: id ``[B]``, embedding ``[B, D]``, the normed hidden state it was drawn from, log-probability and entropy."""

    ids_B: Tensor
    embeds_BD: Tensor
    normed_BD: Tensor
    log_prob_B: Tensor
    entropy_B: Tensor


class Verbalizer(nn.Module):
    """Says what an activation holds.

    The prompt's slot takes the projected activation: in place of the slot's residual after block ``layer_l`` (``inject: block``; the
    blocks above go on from there as if the subject itself had been there), or in place of its embedding.

    Args:
        lm: the subject's model, shared and frozen.
        tokenizer: the subject's.
        mean_D, var_D: statistics of the training activations.
        frozen_as: make one that is not trained, without dropout, whose adapters have this name; None: the one that is trained.
    """

    lm: CausalLM
    projection: StandardisedLinear | FixedNorm

    def __init__(
        self,
        config: Config,
        lm: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        mean_D: Tensor,
        var_D: Tensor,
        frozen_as: str | None = None,
    ):
        super().__init__()
        self.__dict__["lm"] = lm  # shared: registered once, in the subject
        options, mode = config.verbalizer, config.mode_of("verbalizer")
        self.end_id = end_id_of(config, tokenizer)
        self.t_text, self.checkpoint_every = config.t_text, options.checkpoint_every_n_tokens
        prompts, device = prompts_of(config, tokenizer), lm.vocabulary.in_weight.device
        left_ids, right_ids = prompts.left, prompts.right
        embeddings = lm.embed(torch.tensor(left_ids + right_ids, device=device, dtype=torch.long))
        vocabulary = lm.vocabulary.in_weight.split(1024)  # never all of it in float32
        middle_D = sum(rows.float().sum(0) for rows in vocabulary) / len(lm.vocabulary.in_weight)
        slot = (middle_D * lm.embed_scale)[None].to(embeddings.dtype)
        if prompts.marker:
            slot = lm.embed(torch.tensor(prompts.marker, device=device))
        self.slot, self.length = len(left_ids), len(left_ids) + 1 + len(right_ids)
        self.prompt = PromptEmbedding(torch.cat([embeddings[: self.slot], slot, embeddings[self.slot :]]))
        self.prompt.requires_grad_(options.trainable_prompt)
        self.enters = config.layer_l + 1 if options.inject == "block" else 0
        self.blocks = lm.num_blocks
        std_D = var_D.clamp_min(1e-12).sqrt()
        if options.inject == "block":
            offset_D, scale_D = mean_D, std_D
        else:
            norm = torch.cat([rows.float().norm(dim=-1) for rows in vocabulary]).mean().to(mean_D.device) * lm.embed_scale
            offset_D, scale_D = torch.zeros_like(mean_D), norm / len(mean_D) ** 0.5 * torch.ones_like(std_D)
        self.projection = StandardisedLinear(mean_D, std_D, offset_D, scale_D, lm.dtype)
        if options.inject_norm is not None:
            self.projection = FixedNorm(options.inject_norm)
        trained = range(self.enters, self.blocks)
        self.own = OwnBlocks(lm.blocks, trained if mode == "full" else ())
        self.own_norm = deepcopy(lm.norm) if mode == "full" else None
        if self.own_norm is not None:
            self.own_norm.requires_grad_(True)
        self.adapter = (frozen_as or "verbalizer") if mode == "lora" and len(trained) else None
        lora = replace(config.lora_of("verbalizer"), dropout=0.0) if frozen_as else config.lora_of("verbalizer")
        self.adapter_parameters = add_adapter(lm, self.adapter, trained, lora, config.seed) if self.adapter else {}
        if frozen_as:
            for parameter in (*self.parameters(), *self.adapter_parameters.values()):
                parameter.requires_grad_(False)

    def forward(self, method: str, *args: Any, **options: Any) -> Any:
        """Every use goes through here, so that engines' hooks on the module see it."""
        with adapter(self.lm, self.adapter):
            return getattr(self, f"_{method}")(*args, **options)

    def decode(
        self,
        a_BD: Tensor,
        keys: Callable[[int], Tensor] | None = None,
        tau: float = 1.0,
        noise: float = 1.0,
        sample_id_B: Tensor | None = None,
    ) -> Text:
        """Decode ``t_text`` tokens from activations ``[B, D]``; with an end token, what stands behind it counts for nothing.

        Args:
            keys: noise key ``[B]`` of each token index (:func:`megalens.ops.noise_keys`); None: greedy, without noise.
            tau: temperature of the straight-through gradient.
            noise: scale of the Gumbel noise.
            sample_id_B: check every hidden state, and call its sample by this name.

        Raises:
            FloatingPointError: a checked hidden state is NaN or infinite.
        """
        return self("decode", a_BD, keys, tau, noise, sample_id_B)

    def sample(
        self,
        a_BD: Tensor,
        keys: Callable[[int], Tensor],
        draws: int,
        law: Law = ITS_OWN,
        ranks: Ranks | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Sampled:
        """``draws`` texts of each activation, without gradient: see :func:`megalens.lens.sampling.sample`."""
        return self("sample", a_BD, keys, draws, law, ranks, watch)

    def score(self, a_BD: Tensor, ids_NT: Tensor, law: Law = ITS_OWN, floor_NT: Tensor | None = None) -> LogProb:
        """Log-probability of saying given tokens and entropy ``[N, T]``, teacher-forced, in nats, differentiable.

        Args:
            a_BD: activations; prompt and slot are run once for each.
            ids_NT: N = B * K texts, those of an activation side by side.
            law: how they were sampled.
            floor_NT: of each nucleus then; see :func:`megalens.lens.sampling.score`.
        """
        return self("score", a_BD, ids_NT, law, floor_NT)

    def log_prob_of(self, a_BD: Tensor, ids_NT: Tensor) -> Tensor:
        """Log-probabilities ``[N, T]`` of saying the given tokens, teacher-forced, in nats: one text or several of each activation."""
        return self.score(a_BD, ids_NT).log_prob

    def likeliest(self, a_BD: Tensor, ids_BT: Tensor, count: int) -> Tensor:
        """The ``count`` likeliest tokens ``[B, T, count]`` at each place of given texts, the likeliest first."""
        return self("likeliest", a_BD, ids_BT, count)

    def _start(self, a_BD: Tensor, room: int | None) -> tuple[Tensor, KVCache]:
        """Run the prompt: what does not see the activation once, the rest per row. Hidden state ``[B, D]`` of its last position.

        ``room`` is of the cache, in positions.
        """
        lm, slot, own = self.lm, self.slot, self._own()
        positions = torch.arange(self.length, device=a_BD.device)[None]
        cache = KVCache(room)
        hidden_1LD = lm.enter(self.prompt(), positions)
        hidden_1LD = lm.run(hidden_1LD, 0, self.enters, positions, cache=cache, own=own)
        value_B1D = self.projection(a_BD)[:, None].to(hidden_1LD.dtype)
        if slot:  # only its keys and values are used, but a sharded engine gathers a block for backward through its output
            seen_1LD = lm.run(hidden_1LD[:, :slot], self.enters, self.blocks, positions[:, :slot], cache=cache, own=own)
            value_B1D = value_B1D + 0.0 * seen_1LD[:, -1:]
        if self.enters == 0:
            value_B1D = lm.enter(value_B1D, positions[:, slot : slot + 1])
        hidden = torch.cat([value_B1D, hidden_1LD[:, slot + 1 :].expand(len(a_BD), -1, -1)], dim=1)
        hidden = lm.run(hidden, self.enters, self.blocks, positions[:, slot:], cache=cache, own=own)
        return hidden[:, -1], cache

    def _append(self, embeds_BSD: Tensor, already: int, cache: KVCache) -> Tensor:
        """Run text tokens behind the prompt and ``already`` earlier ones; hidden states ``[B, S, D]``."""
        end = self.length + already + embeds_BSD.shape[1]
        positions = torch.arange(self.length + already, end, device=embeds_BSD.device)[None]
        return self.lm.run(self.lm.enter(embeds_BSD, positions), 0, self.blocks, positions, cache=cache, own=self._own())

    def _decode(self, a_BD: Tensor, keys, tau: float, noise: float, sample_id_B: Tensor | None) -> Text:
        hidden_BD, cache = self._start(a_BD, self.length + self.t_text)
        still = torch.zeros(len(a_BD), dtype=torch.long, device=a_BD.device)

        def draw(hidden_BD: Tensor, t: int) -> Draw:
            normed_BD = self._norm(hidden_BD)
            if sample_id_B is not None:
                _check_finite(normed_BD, t, sample_id_B)
            key_B, scale = (still, 0.0) if keys is None else (keys(t), noise)
            ids_B, embeds_BD, log_prob_B, _, entropy_B = self.lm.vocabulary(
                lambda out, into, bias: tuple(
                    gumbel_embed(normed_BD, out, into, tau, key_B, noise=scale, bias_V=bias, softcap=self.lm.softcap)
                )
            )
            return Draw(ids_B, embeds_BD * self.lm.embed_scale, normed_BD, log_prob_B, entropy_B)

        def stretch(embeds_BD: Tensor, cache: KVCache, first: int, last: int):
            """Hidden state ``[B, D]`` behind token ``last - 1``, given token ``first``'s embedding, and what is drawn on the way."""
            cache, drawn = cache.fork(), []
            with adapter(self.lm, self.adapter):  # here, because the backward runs a checkpointed stretch again
                for t in range(first, last):
                    hidden_BD = self._append(embeds_BD[:, None].to(self.lm.dtype), t, cache)[:, 0]
                    if t + 1 < last:
                        drawn.append(draw(hidden_BD, t + 1))
                        embeds_BD = drawn[-1].embeds_BD
            return hidden_BD, cache, drawn

        text, every = [draw(hidden_BD, 0)], self.checkpoint_every or self.t_text
        run = partial(checkpoint, stretch, use_reentrant=False) if self.checkpoint_every and torch.is_grad_enabled() else stretch
        for first in range(0, self.t_text - 1, every):
            last = min(first + every, self.t_text - 1)
            hidden_BD, cache, drawn = run(text[-1].embeds_BD, cache, first, last)
            text += [*drawn, draw(hidden_BD, last)]
        return ended(Text(*(torch.stack(field, dim=1) for field in zip(*text, strict=True))), self.end_id)

    @torch.no_grad()
    def _sample(self, a_BD: Tensor, keys, draws: int, law: Law, ranks: Ranks | None, watch: Callable | None) -> Sampled:
        return sample(self, a_BD, keys, draws, law, ranks or Alone(), watch)

    def _score(self, a_BD: Tensor, ids_NT: Tensor, law: Law, floor_NT: Tensor | None) -> LogProb:
        floor = None if floor_NT is None else floor_NT.flatten()
        found = score(self.lm, self._teacher_forced(a_BD, ids_NT).flatten(0, 1), ids_NT.flatten(), law, floor)
        return LogProb(*(field.view(ids_NT.shape) for field in found))

    def _likeliest(self, a_BD: Tensor, ids_BT: Tensor, count: int) -> Tensor:
        normed_BTD = self._teacher_forced(a_BD, ids_BT)
        return torch.stack([self.lm.logits(normed_BD).topk(count).indices for normed_BD in normed_BTD.unbind(1)], dim=1)

    def _teacher_forced(self, a_BD: Tensor, ids_NT: Tensor) -> Tensor:
        """Normed hidden states ``[N, T, D]`` from which each token of a text is said."""
        hidden_BD, cache = self._start(a_BD, room=None)
        hidden_NTD = hidden_BD.repeat_interleave(len(ids_NT) // len(a_BD), 0)[:, None]
        if ids_NT.shape[1] > 1:
            hidden_NTD = torch.cat([hidden_NTD, self._append(self.lm.embed(ids_NT[:, :-1]), 0, cache)], dim=1)
        return self._norm(hidden_NTD)

    def _norm(self, hidden: Tensor) -> Tensor:
        return self.lm.final_norm(hidden, self.own_norm)

    def _own(self) -> dict[int, nn.Module]:
        return {int(i): block for i, block in self.own.items()}


def _check_finite(hidden_BD: Tensor, token: int, sample_id_B: Tensor) -> None:
    bad_B = ~hidden_BD.isfinite().all(-1)
    if bad_B.any():
        raise FloatingPointError(f"the hidden state of sample {sample_id_B[bad_B][0].item()} before token {token} is not finite")
