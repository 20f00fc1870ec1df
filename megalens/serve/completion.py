"""The subject's own continuation of a text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from megalens.serve.reader import Reader
from megalens.serve.schema import Completion
from megalens.serve.tokens import BROKEN, GLYPH, Encoded, Span, decode, glyphs


class _Ended(Exception):
    """The subject has said its end token."""


def go_on(reader: Reader, encoded: Encoded, tokens: int, asked: Completion, tell: Callable[[list[int]], None]) -> list[int]:
    """Ids of the continuation, up to and with an end token; ``tell`` is given all so far with each token."""
    draw, ends, said = torch.Generator().manual_seed(asked.seed), _end_ids(reader), []

    def choose(logits_1V: Tensor) -> Tensor:
        if asked.temperature == 0:
            next_11 = logits_1V.argmax(-1, keepdim=True)
        else:
            p_1V = (logits_1V.float() / asked.temperature).softmax(-1).cpu()
            next_11 = torch.multinomial(p_1V, 1, generator=draw).to(logits_1V.device)
        said.append(int(next_11))
        tell(said)
        if said[-1] in ends:
            raise _Ended
        return next_11

    with suppress(_Ended):
        reader.module.subject.go_on(torch.tensor([encoded.ids], device=reader.device), tokens, choose=choose)
    return said


def tokens_of(reader: Reader, encoded: Encoded, ids: Sequence[int], chat: bool, whole: bool = True) -> list[dict[str, Any]]:
    """A ``TokenInfo`` for each token of a continuation.

    Args:
        ids: of the continuation.
        chat: the text was a chat: they are the assistant's.
        whole: False: more will come; tokens whose sign may still be completed are left out.
    """
    ends, start, found = _end_ids(reader), len(encoded.ids), []
    for at, (number, (token, index, count)) in enumerate(zip(ids, glyphs(reader.tokenizer, ids), strict=True)):
        if not whole and len(ids) - at <= GLYPH and BROKEN in token and BROKEN in decode(reader.tokenizer, ids[at:]):
            break
        span = Span("assistant", "footer" if number in ends else "content") if chat else Span()
        place = {"token": token, "token_id": number, "position": start + at, "fragment_index": index, "fragment_count": count}
        found.append(place | asdict(span))
    return found


def _end_ids(reader: Reader) -> set[int]:
    configured = getattr(reader.module.subject.lm.config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return {number for number in [*ends, reader.tokenizer.eos_token_id] if number is not None}
