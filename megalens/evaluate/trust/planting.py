"""The part of the suite that plants concepts (:mod:`megalens.evaluate.trust.planted`) and counts how often they are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megalens.evaluate.measure import said
from megalens.evaluate.text import to_texts
from megalens.evaluate.trust.judged import Judged, Line, difference, judge, mean
from megalens.evaluate.trust.parts import Figures, Known, part
from megalens.evaluate.trust.planted import Concept, Steering, choose_concepts, direction, winner
from megalens.evaluate.trust.rows import TrustRows, unit
from megalens.evaluate.trust.words import content_words

DOSES = (0.125, 0.25, 0.5, 1.0)
CONTEXTS, DRAWS, WORDS, BEHAVIOUR = 24, 3, 32, 20
_FIRST_CELL = 1 << 40  # numbers of the cells in the noise, far from any row's


@dataclass
class Planting:
    """What is planted: concepts, their directions, and directions that only look like theirs.

    Args:
        concepts: K of them.
        vectors: by kind (``concept``, ``placebo``: random, ``label``: from documents drawn at random), unit vectors ``[K, D]``.
        steering: where they are added.
    """

    concepts: list[Concept]
    vectors: dict[str, Tensor]
    steering: Steering


@dataclass
class Cells:
    """Whether each concept was named, ``[contexts, K]`` by condition; ``context_N`` numbers the contexts."""

    hits: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, name: str, concepts: Sequence[Concept], texts: Sequence[Sequence[str]], before: Sequence[str] = ()) -> None:
        """One context's texts, one set of them for each planted concept."""
        points = [winner(concepts, each, before).get(k, 0.0) for k, each in enumerate(texts)]
        self.hits.setdefault(name, []).append(np.array(points))

    def flat(self, name: str) -> np.ndarray:
        """All cells of a condition ``[contexts * K]``."""
        return np.concatenate(self.hits[name])


def prepare(rows: TrustRows, concepts: list[Concept], leads: Sequence[list[int]], seed: int = 0) -> Planting:
    """Directions of concepts at block ``layer_l // 2``.

    Args:
        leads: token ids of the training documents, numbered as in the concepts.
    """
    steering, draw = Steering(rows.lens.subject, rows.lens.subject.layer_l // 2), np.random.default_rng(seed)
    least = min(len(concept.documents) for concept in concepts)
    everything_D = direction(steering, [leads[i] for i in draw.permutation(len(leads))[:400]])

    def towards(documents: Sequence[int]) -> Tensor:
        return torch.nn.functional.normalize(direction(steering, [leads[i] for i in documents]) - everything_D, dim=0)

    own = [towards(draw.permutation(concept.documents)[:40].tolist()) for concept in concepts]
    label = [towards(draw.permutation(len(leads))[: min(40, least)].tolist()) for _ in concepts]
    placebo = torch.from_numpy(unit(draw.normal(size=(len(concepts), len(everything_D)))))
    return Planting(concepts, {"concept": torch.stack(own), "placebo": placebo, "label": torch.stack(label)}, steering)


@part("planted")
def _planted(rows: TrustRows, known: Known) -> Figures:
    """Does the lens name a concept that only the activation holds?"""
    if known.leads is None:
        return {}
    concepts = choose_concepts(known.leads.glosses, known.leads.texts)
    if len(concepts) < 2:
        return {}
    return plant(rows, prepare(rows, concepts, known.leads.ids, rows.lens.config.seed))


@torch.no_grad()
def plant(rows: TrustRows, planting: Planting, bootstrap: int = 1000, progress: bool = True) -> Figures:
    """Plant each concept at each dose into contexts that do not hold it, and count who names it.

    Returns:
        ``planted_hit``, ``planted_lift`` (against a random direction of the same dose; below a half, of a half), the controls
        ``placebo_hit``, ``label_hit``, ``negative_hit``, the readers that need no lens ``logit_lens_hit`` and ``behaviour_hit``,
        ``planted_hidden`` (named where the behaviour does not show it), ``planted_rebuild`` (does the reconstructor hear it), each
        ``@dose``; ``fluent@dose``, the share of continuations that are not below the first percentile of unsteered ones; ``contexts``.
    """
    cells, chosen = Cells(), contexts_without(rows, planting.concepts)
    rebuilt: dict[str, list[np.ndarray]] = {}
    fluency: dict[str, list[np.ndarray]] = {}
    for number, row in enumerate(tqdm(chosen, desc="planted concepts", unit="context", disable=not progress)):
        ids_1C = torch.tensor([rows.contexts[row]], device=rows.lens.mean.device)
        for name, value in _one_context(rows, planting, ids_1C, number, cells).items():
            (rebuilt if name.startswith("rebuild") else fluency).setdefault(name, []).append(value)
    return _figures(planting, cells, rebuilt, fluency, len(chosen), bootstrap)


def contexts_without(rows: TrustRows, concepts: Sequence[Concept], count: int = CONTEXTS) -> list[int]:
    """The first rows, one of each document, whose last words hold no word of any lexicon."""
    lexicon = frozenset().union(*(concept.lexicon for concept in concepts))
    seen: set[int] = set()
    chosen: list[int] = []
    for row in np.argsort(rows.sample_id_N, kind="stable"):
        text = str(rows.lens.tokenizer.decode(rows.contexts[row], skip_special_tokens=True))
        clean = not content_words(" ".join(text.split()[-WORDS:])) & lexicon
        if clean and rows.doc_id_N[row] not in seen and len(chosen) < count:
            seen.add(rows.doc_id_N[row])
            chosen.append(int(row))
    return chosen


def _one_context(rows: TrustRows, planting: Planting, ids_1C: Tensor, number: int, cells: Cells) -> dict[str, np.ndarray]:
    """All cells of one context, and for each dose what the reconstructor hears and how fluent the behaviour is."""
    steering, concepts, found = planting.steering, planting.concepts, {}
    norm = steering.stream(ids_1C)[0, 1:].norm(dim=-1).median()
    none_BD = torch.zeros_like(steering.stream(ids_1C)[:, 0])
    plain_BD = steering.read(ids_1C, none_BD)
    before, plain_text = explain(rows, plain_BD, number, 0)[0], to_texts(rows.lens.tokenizer, steering.go_on(ids_1C, none_BD))
    found["fluency@0"] = _fluency(rows, ids_1C, steering.go_on(ids_1C, none_BD))
    plain_rebuilt = rows.read(before[:1])
    for order, (kind, dose) in enumerate(conditions()):
        sign = -1.0 if kind == "negative" else 1.0
        unit_KD = planting.vectors["concept" if kind == "negative" else kind]
        vector_KD = (sign * dose * norm * unit_KD).to(none_BD)
        repeated_KC = ids_1C.expand(len(concepts), -1)
        a_KD = steering.read(repeated_KC, vector_KD)
        texts = explain(rows, a_KD, number, 1 + order)
        cells.add(f"{kind}@{dose:g}", concepts, texts)
        cells.add(f"{kind}_change@{dose:g}", concepts, texts, before)
        if kind == "concept":
            cells.add(f"logit_lens@{dose:g}", concepts, [[text] for text in logit_lens(rows, a_KD)])
            behaviour_KT = steering.go_on(repeated_KC, vector_KD, BEHAVIOUR)
            shown = [[text] for text in to_texts(rows.lens.tokenizer, behaviour_KT)]
            cells.add(f"behaviour@{dose:g}", concepts, shown, plain_text)
            found[f"fluency@{dose:g}"] = _fluency(rows, repeated_KC, behaviour_KT)
            moved_KD = unit((a_KD - plain_BD).double().cpu().numpy())
            heard_KD = unit(rows.read([each[0] for each in texts]) - plain_rebuilt)
            found[f"rebuild@{dose:g}"] = (moved_KD * heard_KD).sum(-1)
    return found


def conditions() -> list[tuple[str, float]]:
    """What is planted how strongly."""
    return (
        [("concept", dose) for dose in DOSES] + [(kind, dose) for kind in ("placebo", "label") for dose in (0.5, 1.0)] + [("negative", 0.5)]
    )


def explain(rows: TrustRows, a_BD: Tensor, context: int, condition: int) -> list[list[str]]:
    """Three sampled texts of each activation; the noise depends on the context, the condition and the place alone."""
    first = _FIRST_CELL + (context * 64 + condition) * 1024
    ids_BKT = rows.lens.rollout(a_BD, torch.arange(first, first + len(a_BD), device=a_BD.device), 0, DRAWS).ids_BKT
    return [said(rows.lens, ids_KT).texts for ids_KT in ids_BKT]


def logit_lens(rows: TrustRows, a_BD: Tensor, words: int = 20) -> list[str]:
    """The most likely next tokens if the subject ended behind this activation, as one string for each."""
    lm = rows.lens.subject.lm
    top_BW = lm.logits(lm.final_norm(a_BD.to(lm.dtype))).topk(words, dim=-1).indices
    return [" ".join(to_texts(rows.lens.tokenizer, top_W[:, None])) for top_W in top_BW]


def _fluency(rows: TrustRows, ids_BC: Tensor, said_BT: Tensor) -> np.ndarray:
    """Mean log-probability per token ``[B]`` of continuations under the unsteered subject."""
    lm = rows.lens.subject.lm
    states_BTD = rows.lens.subject.next_states(ids_BC[:1], said_BT)
    log_prob = lm.logits(states_BTD).float().log_softmax(-1).gather(-1, said_BT[..., None])[..., 0]
    return log_prob.mean(1).double().cpu().numpy()


def _figures(planting: Planting, cells: Cells, rebuilt: dict, fluency: dict, contexts: int, bootstrap: int) -> Figures:
    context_N = np.repeat(np.arange(contexts), len(planting.concepts))

    def judged(value_N: np.ndarray, line: Line | None = None) -> Judged:
        return judge(mean(value_N), context_N, line, bootstrap)

    found: Figures = {"contexts": contexts, "concepts": len(planting.concepts)}
    if not contexts:
        return found
    named = {"concept": "planted", "placebo": "placebo", "label": "label", "negative": "negative"}
    for kind, dose in conditions():
        for way in ("", "_change"):
            found[f"{named[kind]}_hit{way}@{dose:g}"] = judged(cells.flat(f"{kind}{way}@{dose:g}"))
    floor = np.quantile(np.concatenate(fluency["fluency@0"]), 0.01)
    for dose in DOSES:
        hit_N, behaviour_N = cells.flat(f"concept@{dose:g}"), cells.flat(f"behaviour@{dose:g}")
        placebo_N = cells.flat(f"placebo@{max(dose, 0.5):g}")
        found[f"logit_lens_hit@{dose:g}"], found[f"behaviour_hit@{dose:g}"] = (
            judged(cells.flat(f"logit_lens@{dose:g}")),
            judged(behaviour_N),
        )
        found[f"planted_hidden@{dose:g}"] = judged(hit_N * (behaviour_N < 0.5))
        lift = difference(mean(hit_N), mean(placebo_N))
        found[f"planted_lift@{dose:g}"] = judge(lift, context_N, Line(0.0), bootstrap)
        found[f"planted_rebuild@{dose:g}"] = judged(np.concatenate(rebuilt[f"rebuild@{dose:g}"]))
        found[f"fluent@{dose:g}"] = float((np.concatenate(fluency[f"fluency@{dose:g}"]) >= floor).mean())
    return found
