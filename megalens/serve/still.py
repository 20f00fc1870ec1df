"""What a page shows of one text without a server: the same figures as the server's, worked out beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megalens.api import Lens
from megalens.data.pretokenize import encode
from megalens.evaluate.tokens import TokenExplanation
from megalens.serve.limits import Limits
from megalens.serve.reader import Context, Reader
from megalens.serve.tokens import Encoded


def found(lens: Lens, text: str, tokens: Sequence[TokenExplanation], whole: bool = True) -> list[dict[str, Any]]:
    """A text's explanations for :func:`megalens.page.workbench.workbench`.

    Args:
        tokens: as ``lens.explain(text)`` gives them.
        whole: with figures beside them, each phrase's share of the FVE, and the logit lens. Where several processes hold the lens
            together, only those that work together could.
    """
    dumper = lens.module.config.activation_dumper
    trained = range(dumper.min_pos, dumper.seq_len)
    results: list[dict[str, Any]] = [
        {
            "position": at,
            "token": each.token,
            "fragment_index": 0,
            "fragment_count": 1,
            "description": each.explanation,
            "megalens": {"fve": each.fve, "search": each.search, "reads": each.reads, "trained": at in trained},
        }
        for at, each in enumerate(tokens)
    ]
    if not whole:
        return results
    reader, ids = Reader(lens, Limits()), encode(lens.module.tokenizer, [text])[0]
    a_CD = lens.module.subject.residual(torch.tensor([ids], device=reader.device))[0].float()
    rows = reader.rows(Context(Encoded(text, ids), list(range(len(ids))), a_CD), 0)
    told = reader.beside([each.explanation for each in tokens], rows)
    for each, worth, likeliest, a_D in zip(results, told, reader.logit_lens(a_CD), a_CD, strict=True):
        drops = reader.drops(worth.description, a_D)
        each["megalens"] = worth.extra | each["megalens"] | {"logit_lens": likeliest, "drops": drops}
    return results
