"""Several texts of each activation, sampled without gradient, and the probability of given texts under the law they were sampled by.

The law is the verbalizer's next-token distribution at a temperature, cut to its nucleus where ``top_p`` is below 1. A temperature divides
the hidden states, the bias and the soft-cap of the head, and so divides the logits, in every operation on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from megalens.families.causal_lm import CausalLM
from megalens.ops import LogProb, gumbel_embed, nucleus_log_mass, sample_nucleus, vocab_log_prob

if TYPE_CHECKING:
    from megalens.lens.verbalizer import Verbalizer

CHECK_EVERY = 4  # tokens between two looks at whether every text has ended: a look waits for the device and asks all ranks


class Ranks(Protocol):
    """What a sampler asks of the processes that sample with it. An engine is one."""

    def any(self, flag: bool) -> bool:
        """Is the flag up on any rank?"""
        ...

    def reduce_mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over ranks of scalars by name."""
        ...


class Alone:
    """One process: nobody to ask."""

    def any(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def reduce_mean(self, values: dict[str, float]) -> dict[str, float]:
        """The values themselves."""
        return values


@dataclass(frozen=True)
class Law:
    """How tokens are sampled.

    Args:
        temperature: divides the logits; 0: the likeliest token, with its log-probability at temperature 1.
        top_p: share of the probability that a nucleus holds; 1: all of it.
    """

    temperature: float = 1.0
    top_p: float = 1.0


ITS_OWN = Law()
"""The verbalizer's own distribution."""


class Sampled(NamedTuple):
    """N texts of up to T tokens: ids, log-probability of each under the law, and the floor of each nucleus (None where ``top_p`` is 1).

    Behind an end token stand more of it, of log-probability 0.
    """

    ids_NT: Tensor
    log_prob_NT: Tensor
    floor_NT: Tensor | None


def sample(
    v: Verbalizer,
    a_BD: Tensor,
    keys: Callable[[int], Tensor],
    draws: int,
    law: Law,
    ranks: Ranks,
    watch: Callable[[Tensor], None] | None = None,
) -> Sampled:
    """``draws`` texts of each activation ``[B, D]``, of T = ``t_text`` tokens at most.

    Prompt and slot are run once for all texts of an activation. Where there is an end token, the decode stops when all texts of all ranks
    have ended: ranks that share weights decode equally many tokens.

    Args:
        keys: noise key ``[B * K]`` of each token index, the draws of an activation side by side.
        ranks: that call this together.
        watch: called with each token's ids ``[N]`` as they are drawn; what it raises ends the decode.
    """
    hidden_BD, cache = v._start(a_BD, room=None)
    cache.room = v.length + v.t_text
    hidden_ND, said = hidden_BD.repeat_interleave(draws, 0), []
    ended_N = torch.zeros(len(hidden_ND), dtype=torch.bool, device=a_BD.device)
    for t in range(v.t_text):
        ids_N, embeds_ND, *scores = _draw(v.lm, v._norm(hidden_ND), keys(t), law)
        if v.end_id is not None:
            ids_N = ids_N.masked_fill(ended_N, v.end_id)
            scores[0] = scores[0].masked_fill(ended_N, 0.0)
            ended_N = ended_N | (ids_N == v.end_id)
        said.append([ids_N, *scores])
        if watch is not None:
            watch(ids_N)
        looks = v.end_id is not None and (t + 1) % CHECK_EVERY == 0 and not ended_N.is_meta
        if t + 1 == v.t_text or (looks and not ranks.any(not bool(ended_N.all()))):
            break
        hidden_ND = v._append((embeds_ND * v.lm.embed_scale).to(v.lm.dtype)[:, None], t, cache)[:, 0]
    fields = [torch.stack(field, 1) for field in zip(*said, strict=True)]
    missing = v.t_text - len(said)
    ids_NT, log_prob_NT, *floor = (
        torch.nn.functional.pad(field, (0, missing), value=value) if missing else field
        for field, value in zip(fields, (v.end_id or 0, 0.0, -torch.inf), strict=False)
    )
    return Sampled(ids_NT, log_prob_NT, floor[0] if floor else None)


def _draw(lm: CausalLM, normed_ND: Tensor, keys_N: Tensor, law: Law) -> list[Tensor]:
    """A token of each row: id, embedding, log-probability under the law and, where ``top_p`` is below 1, the nucleus' floor."""
    hidden_ND, softcap = _cooled(normed_ND, law), _cooled(lm.softcap, law)

    def use(out_VD: Tensor, in_VD: Tensor, bias_V: Tensor | None) -> tuple[Tensor, ...]:
        bias_V = _cooled(bias_V, law)
        if law.top_p < 1 and law.temperature:
            ids_N, log_prob_N, floor_N = sample_nucleus(hidden_ND, out_VD, law.top_p, keys_N, bias_V=bias_V, softcap=softcap)
            return ids_N, in_VD[ids_N], log_prob_N, floor_N
        noise = 1.0 if law.temperature else 0.0
        drawn = gumbel_embed(hidden_ND, out_VD, in_VD, 1.0, keys_N, noise=noise, bias_V=bias_V, softcap=softcap)
        return drawn.ids, drawn.embeds, drawn.log_prob

    return list(lm.vocabulary(use))


def score(lm: CausalLM, normed_ND: Tensor, ids_N: Tensor, law: Law, floor_N: Tensor | None) -> LogProb:
    """Log-probability of given tokens under the law, differentiable, and the entropy of the whole distribution at its temperature.

    Args:
        floor_N: of each nucleus when the tokens were sampled; a given token counts as inside. None: nothing is cut off.
    """
    hidden_ND, softcap = _cooled(normed_ND, law), _cooled(lm.softcap, law)

    def use(out_VD: Tensor, _: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
        bias_V = _cooled(bias_V, law)
        log_prob_N, entropy_N = vocab_log_prob(hidden_ND, out_VD, ids_N, bias_V=bias_V, softcap=softcap)
        if floor_N is not None:
            inside_N = torch.minimum(floor_N, log_prob_N.detach() - 1e-3)
            log_prob_N = log_prob_N - nucleus_log_mass(hidden_ND, out_VD, inside_N, bias_V=bias_V, softcap=softcap)
        return log_prob_N, entropy_N

    return LogProb(*lm.vocabulary(use))


def _cooled(value, law: Law):
    """A part of the head, divided by the temperature."""
    return value if value is None or law.temperature in (0.0, 1.0) else value / law.temperature
