"""Explanations of several searches side by side, on the same rows: what each is worth, to whom, and what it took.

Beside them stand copies of the context's last tokens, by which a lens can be counted: in copied tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megalens.batch import Batch
from megalens.config import Evaluation
from megalens.data.loader import ActivationLoader
from megalens.engine.base import to_device
from megalens.evaluate.measure import Cost, RowScorer, Said, nats_per_token, read_by_lens
from megalens.evaluate.metrics import Rows, figures, join, row_fve, row_statistics
from megalens.evaluate.readers import Reader
from megalens.evaluate.text import pad, to_ids, to_texts
from megalens.evaluate.trust.beside_copies import FIGURES, copied_tokens, halves, trust_statistics
from megalens.lens.lens import ConsistencyLens
from megalens.statistics import ActivationStatistics

COPIES = (1, 2, 4, 8, 16)  # tokens


@dataclass
class Comparison:
    """Searches on the same rows, ready for JSON.

    Args:
        rows: how many, of how many ``documents``.
        other_reader: its name.
        copy: figures of copies of ``t_text`` tokens; where texts end where they like, of as many as the first search's.
        searches: figures of each search by its name: of :mod:`megalens.evaluate.metrics`, :mod:`megalens.evaluate.trust.beside_copies`;
            ``copied_tokens``; ``perplexity``, the median of the texts' under the untouched subject; ``roundtrip``; ``reads``, ``said`` and
            ``priced``, what an activation took on average (:class:`megalens.evaluate.measure.Cost`).
        copies: ``fve_nrm`` of copies through the lens's reconstructor, by their number of tokens, the smallest first.
        texts: each search's texts, row by row: ``explanation`` and ``fve``.
    """

    rows: int
    documents: int
    other_reader: str
    copy: dict[str, float]
    searches: dict[str, dict[str, float]] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)
    texts: dict[str, list[dict]] = field(default_factory=dict)


@torch.no_grad()
def compare(
    lens: ConsistencyLens,
    loader: ActivationLoader,
    options: Evaluation,
    doc_ids: np.ndarray,
    searched: dict[str, Said],
    statistics: ActivationStatistics,
    reader: Reader,
) -> Comparison:
    """Measure explanations of the first rows.

    Args:
        options: ``batch_size`` and ``bootstrap`` of them.
        doc_ids: of these rows.
        searched: the explanations of each search by its name.
        statistics: of the TRAINING activations.
        reader: one that took no part in the searches.
    """
    count = len(doc_ids)
    texts = {name: said.texts for name, said in searched.items()}
    parts: dict[str, list[Rows]] = {name: [] for name in ("", *texts)}
    curve: dict[int, list[Rows]] = {number: [] for number in COPIES}
    for numbers in np.split(np.arange(count), range(options.batch_size, count, options.batch_size)):
        batch = to_device(loader.rows(numbers), lens.mean.device)
        here = {name: [each[i] for i in numbers] for name, each in texts.items()}
        for name, rows in _rows(lens, batch, here, statistics, reader).items():
            parts[name].append(rows)
        for number, each in curve.items():
            rebuild = read_by_lens(lens, copies(lens, batch, [number] * len(numbers)))
            each.append(row_statistics(batch["activation"], rebuild.a_hat_BD, statistics, rebuild.failed_B))
    half, bootstrap = {"half": halves(doc_ids)}, options.bootstrap
    found = {name: figures(join(each) | half, doc_ids, bootstrap, of=FIGURES) for name, each in parts.items()}
    by_number = {number: figures(join(each))["fve_nrm"] for number, each in curve.items()}
    result = Comparison(count, len(np.unique(doc_ids)), reader.name, found.pop(""), copies={str(n): v for n, v in by_number.items()})
    for name, said in searched.items():
        result.searches[name] = found[name] | {"copied_tokens": copied_tokens(found[name]["fve_nrm"], by_number)} | _about(lens, said)
        fve = row_fve(join(parts[name])).tolist()
        result.texts[name] = [{"explanation": text, "fve": value} for text, value in zip(said.texts, fve, strict=True)]
    return result


def copies(lens: ConsistencyLens, batch: Batch, counts: list[int]) -> list[str]:
    """The last tokens of each context up to P, so many (fewer where it is shorter), as the lens would say them."""
    places = zip(batch["input_ids"].tolist(), batch["position"].tolist(), counts, strict=True)
    contexts = [row[max(0, p + 1 - count) : p + 1] for row, p, count in places]
    return to_texts(lens.tokenizer, *pad([each[-1:] + each[:-1] if lens.reconstructor.first_is_last else each for each in contexts]))


def _rows(
    lens: ConsistencyLens, batch: Batch, texts: dict[str, list[str]], statistics: ActivationStatistics, reader: Reader
) -> dict[str, Rows]:
    """Per-row statistics of copies (under an empty name) and of each search's texts."""
    ids = to_ids(lens.tokenizer, next(iter(texts.values())))
    counts = [lens.config.t_text if lens.frame.end_id is None else len(each) for each in ids]
    score, copied = RowScorer(lens, batch, statistics), copies(lens, batch, counts)
    own, other = read_by_lens(lens, copied), reader.rebuild(lens, copied)
    result = {}
    for name, each in {"": copied, **texts}.items():
        rebuild, others = read_by_lens(lens, each), {"texts": reader.rebuild(lens, each), "copies": other}
        result[name] = score(rebuild) | trust_statistics(batch["activation"], rebuild, own, statistics, others)
    return result


def _about(lens: ConsistencyLens, said: Said) -> dict[str, float]:
    """What is known of texts without the activations."""
    ids = to_ids(lens.tokenizer, said.texts)
    nats = np.concatenate([nats_per_token(lens, ids[i : i + 64]) for i in range(0, len(ids), 64)])
    perplexity = float(np.exp(np.median(nats)))
    about = {"perplexity": perplexity} if np.isfinite(perplexity) else {}
    costs = np.array(said.costs or [Cost()], dtype=float).mean(0)
    return about | {"roundtrip": float(np.mean(said.round_trips))} | dict(zip(Cost._fields, costs.tolist(), strict=True))
