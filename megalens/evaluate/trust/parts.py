"""The parts of the suite: each takes rows and gives figures by name. A new one is a function under :func:`part`.

A figure is a :data:`~megalens.evaluate.trust.judged.Statistic` of the rows, judged over their documents; or a plain number, or a list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megalens.evaluate.measure import Search
from megalens.evaluate.text import pieces, to_ids
from megalens.evaluate.token_means import TokenMeans
from megalens.evaluate.trust.chance import above_chance, fit_confidence, retest
from megalens.evaluate.trust.consensus import agreement, calibration_error, kept
from megalens.evaluate.trust.identify import choice, drawn_partners
from megalens.evaluate.trust.judged import Judged, Statistic, difference, mean, ratio
from megalens.evaluate.trust.rows import PARTNERS, TrustRows, unit
from megalens.evaluate.trust.unusual import fit_usual
from megalens.evaluate.trust.words import content_words, kind_lift, kinds_of_words, said, said_lift

Figures = dict[str, Statistic | Judged | float | int | list | dict]
Words = list[frozenset[str]]
TESTED_SHARES = (0.25, 0.5, 0.75)
PREFIXES = (1, 2, 4, 8, 16)


@dataclass
class Leads:
    """Training documents with their labels: token ids, text and gloss of each."""

    ids: list[list[int]]
    texts: list[str]
    glosses: list[str]


@dataclass
class Known:
    """What is known beside the rows; a part whose knowledge is missing is left out.

    Args:
        search: how the rows' texts were chosen.
        copies: the context's tail in place of each text.
        following: the text that really follows each context, 16 tokens.
        labels: ``title``, ``topic`` and ``gloss`` of each row's document.
        training_ND: activations of training rows.
        token_means: of training activations, by the token at P.
        leads: training documents with their glosses.
    """

    search: Search
    copies: list[str]
    following: list[str] | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)
    training_ND: np.ndarray | None = None
    token_means: TokenMeans | None = None
    leads: Leads | None = None


Part = Callable[[TrustRows, Known], Figures]
PARTS: dict[str, Part] = {}
"""By name, in the order in which they run."""


def part(name: str) -> Callable[[Part], Part]:
    """Register the function below it as a part of the suite."""

    def register(function: Part) -> Part:
        PARTS[name] = function
        return function

    return register


@part("identification")
def _identification(rows: TrustRows, known: Known) -> Figures:
    """Is a rebuild nearer to its own activation than to nine others'?"""
    tenth_N = drawn_partners(rows.doc_id_N, rows.sample_id_N, PARTNERS + 1, rows.lens.config.seed)[:, -1]  # not of the nine
    sources = {"": rows.rebuilt_ND, "_copy": rows.read(known.copies), "_shuffled": rows.rebuilt_ND[tenth_N]}
    if known.token_means is not None:
        token_N = np.array([ids[-1] for ids in rows.contexts])
        sources["_token_mean"] = unit(known.token_means.predict(token_N))
    figures: Figures = {}
    hard: dict[str, Statistic] = {}
    for source, u_hat_ND in sources.items():
        figures[f"choice10{source}"] = _known_mean(choice(rows.u_ND, u_hat_ND, rows.mean_D, rows.partners_NK))
        figures[f"choice10_hard{source}"] = hard[source] = _known_mean(choice(rows.u_ND, u_hat_ND, rows.mean_D, rows.hard_NK))
    if known.token_means is not None:
        figures["choice10_over_token"] = difference(hard[""], hard["_token_mean"])
        figures["fve_token_mean"] = _fve(rows, sources["_token_mean"])
        figures["token_covered"] = float(known.token_means.covered(token_N).mean())
    return figures


@part("reading")
def _reading(rows: TrustRows, known: Known) -> Figures:
    """Does the verbalizer say the context's tail with more ease when it is given the activation?"""
    own_N = rows.tail_nll(rows.a_ND)
    others = {
        "": rows.a_ND[rows.partners_NK[:, 0]],
        "_hard": rows.a_ND[rows.hard_NK[:, 0]],
        "_mean": rows.statistics.mean.cpu().float().expand_as(rows.a_ND),
        "_zero": torch.zeros_like(rows.a_ND),
    }
    return {f"nll_gap{name}": mean(rows.tail_nll(a_ND) - own_N) for name, a_ND in others.items()}


@part("chance")
def _chance(rows: TrustRows, known: Known) -> Figures:
    """Does a text score higher than others' texts would, and would another sample of it?"""
    others_NK = np.stack([rows.fve(rows.rebuilt_ND[rows.partners_NK[:, k]]) for k in range(5)], axis=1)
    first, second = (rows.read(texts) for texts in rows.samples(2))
    first_N, second_N = rows.fve(first), rows.fve(second)
    confidence = fit_confidence(first_N, second_N, others_NK)
    return {
        "above_chance": above_chance(rows.fve_N, others_NK),
        "retest": retest(first_N, second_N, rows.fve(second[rows.partners_NK[:, 0]])),
        "confidence": vars(confidence),
    }


@part("words")
def _words(rows: TrustRows, known: Known) -> Figures:
    """Are the text's words those of the context, of what follows, or of neither?"""
    if known.following is None:
        return {}
    texts, contexts, nexts = (bags(strings) for strings in (rows.texts, context_texts(rows), known.following))
    partner_N = rows.partners_NK[:, 0]
    counted = kinds_of_words(texts, contexts, nexts)
    figures: Figures = {}
    for kind in ("echo", "ahead", "invented"):
        figures[kind] = ratio(counted[kind], counted["words"])
        figures[f"{kind}_lift"] = kind_lift(kind, texts, contexts, nexts, partner_N)
    return figures


@part("labels")
def _labels(rows: TrustRows, known: Known) -> Figures:
    """Does a text say words that are true of the document and that the context has not said, or not lately?"""
    if not known.labels:
        return {}
    texts, contexts, copies = bags(rows.texts), bags(context_texts(rows)), bags(known.copies)
    gloss, title = bags(known.labels["gloss"]), bags(known.labels["title"])
    partner_N = _same_topic(rows, known.labels["topic"])
    unseen = [words - context for words, context in zip(gloss, contexts, strict=True)]
    remembered = [((g | t) & context) - copy for g, t, context, copy in zip(gloss, title, contexts, copies, strict=True)]
    return {
        "unseen_lift": said_lift(texts, unseen, partner_N),
        "unseen_rows": float(np.mean([bool(words) for words in unseen])),
        "remembered_lift": said_lift(texts, remembered, partner_N),
        "tail_recall": ratio(*said(texts, copies)),
    }


@part("leverage")
def _leverage(rows: TrustRows, known: Known) -> Figures:
    """What goes of a row's FVE with each token dropped; how much the first tokens alone hold; what order and surface hold."""
    ids = to_ids(rows.lens.tokenizer, rows.texts)
    tokens = [pieces(rows.lens.tokenizer, row) for row in ids]
    dropped = [(row, "".join(each[:t] + each[t + 1 :])) for row, each in enumerate(tokens) for t in range(len(each))]
    figures: Figures = {}
    if dropped:
        row_M = np.array([row for row, _ in dropped])
        gone_M = rows.fve_N[row_M] - rows.fve(rows.read([text for _, text in dropped]), row_M)
        count_N = np.bincount(row_M, minlength=len(rows)).astype(float)
        figures["leverage"] = ratio(np.bincount(row_M, gone_M, len(rows)), count_N)
        figures["dead_share"] = ratio(np.bincount(row_M, gone_M <= 0, len(rows)), count_N)
    longest = max(map(len, tokens), default=0)
    for count in (k for k in PREFIXES if k < longest):
        figures[f"first_{count}"] = _fve(rows, rows.read(["".join(each[:count]) for each in tokens]))
    numbered = list(zip(rows.sample_id_N.tolist(), rows.texts, strict=True))
    shuffles = [rows.read([_shuffled(text, np.random.default_rng((time, row))) for row, text in numbered]) for time in range(3)]
    plain = rows.read([" ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) for text in rows.texts])
    whole = _fve(rows, rows.rebuilt_ND)
    if float(whole(np.ones((1, len(rows))))[0]) > 0.1:  # a ratio to nothing says nothing
        figures["order_share"] = lambda w_RN: 1 - np.mean([_fve(rows, each)(w_RN) for each in shuffles], axis=0) / whole(w_RN)
        figures["surface_retention"] = lambda w_RN: _fve(rows, plain)(w_RN) / whole(w_RN)
    return figures


@part("consensus")
def _consensus(rows: TrustRows, known: Known) -> Figures:
    """What eight samples of a row agree on, and whether that is right."""
    drawn = [bags(texts) for texts in rows.samples(8)]
    samples = [list(each) for each in zip(*drawn, strict=True)]
    others = [samples[i] for i in rows.partners_NK[:, 0]]
    own, other = (np.array([agreement(a, b) for a, b in zip(samples, pair, strict=True)]) for pair in ([None] * len(rows), others))
    figures: Figures = {"agreement": mean(own), "agreement_lift": difference(mean(own), mean(other))}
    if known.following is not None:
        right = [a | b for a, b in zip(bags(context_texts(rows)), bags(known.following), strict=True)]
        if known.labels:
            right = [a | b for a, b in zip(right, bags(known.labels["gloss"]), strict=True)]
        figures["consensus"] = {str(share): kept(samples, right, share) for share in TESTED_SHARES}
        figures["calibration_error"] = calibration_error(samples, right)
    return figures


@part("unusual")
def _unusual(rows: TrustRows, known: Known) -> Figures:
    """How many of these rows lie where hardly any training activation lies. Half of them set the scale for the other half."""
    if known.training_ND is None or len(rows) < 4:
        return {}
    half = rows.doc_id_N % 2 == 0
    a_ND = rows.a_ND.double().numpy()
    usual = fit_usual(known.training_ND.astype(float), a_ND[half])
    return {"unusual_share": float((usual.percentile(a_ND[~half]) > 0.99).mean()) if (~half).any() and half.any() else float("nan")}


@part("texts")
def _texts(rows: TrustRows, known: Known) -> Figures:
    """Do different activations get different texts, and are the texts text?"""
    ids = to_ids(rows.lens.tokenizer, rows.texts)
    openings = Counter(tuple(text.split()[:3]) for text in rows.texts)
    repeated = [1 - len(set(row)) / len(row) if row else 0.0 for row in ids]
    return {
        "distinct": len(set(rows.texts)) / len(rows),
        "commonest_opening": max(openings.values()) / len(rows),
        "repetition": mean(np.array(repeated)),
        "round_trip": mean(rows.round_trip_N.astype(float)),
    }


def bags(texts: Sequence[str]) -> Words:
    """The content words of each text."""
    return [content_words(text) for text in texts]


def context_texts(rows: TrustRows) -> list[str]:
    """Each context up to P as a string."""
    return rows.lens.tokenizer.batch_decode(rows.contexts, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _fve(rows: TrustRows, u_hat_ND: np.ndarray) -> Statistic:
    """``fve_nrm`` of rebuilds of all rows."""
    spread_N = np.square(rows.u_ND - rows.mean_D).sum(-1)
    explained = ratio(spread_N * (1 - rows.fve(u_hat_ND)), spread_N)
    return lambda weights_RN: 1 - explained(weights_RN)


def _known_mean(value_N: np.ndarray) -> Statistic:
    """Mean of the rows that have a value."""
    there_N = np.isfinite(value_N)
    return ratio(np.where(there_N, value_N, 0.0), there_N.astype(float))


def _same_topic(rows: TrustRows, topics: list[str]) -> np.ndarray:
    """A partner of the same topic for each row, of another document; where there is none, any partner."""
    partner_N = rows.partners_NK[:, 0].copy()
    topic_N, order = np.array(topics, dtype=object), np.argsort(rows.sample_id_N, kind="stable")
    for row in range(len(rows)):
        same = order[(topic_N[order] == topics[row]) & (rows.doc_id_N[order] != rows.doc_id_N[row])]
        if len(same):
            partner_N[row] = same[np.searchsorted(rows.sample_id_N[same], rows.sample_id_N[row]) % len(same)]
    return partner_N


def _shuffled(text: str, draw: np.random.Generator) -> str:
    words = text.split()
    return " ".join(words[i] for i in draw.permutation(len(words)))
