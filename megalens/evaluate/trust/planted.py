"""Planted concepts: a direction is added inside the subject, the text stays as it was, and the lens is asked what it sees.

What is planted is the truth, and no text holds it: a lens that names it has read the activation, not guessed at the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalens.evaluate.trust.words import content_words
from megalens.families.adapters import adapter
from megalens.lens.subject import Subject

CONCEPTS, LEADS, LEXICON = 12, 40, 30
FIRST, LAST = 8, 40  # positions that a concept's direction is taken from


@dataclass(frozen=True)
class Concept:
    """A word of the documents' one-line glosses, and what is known of documents that carry it.

    Args:
        name: the word's stem.
        documents: numbers of the training documents that carry it.
        lexicon: words that tell such documents from others, with their log-odds.
    """

    name: str
    documents: tuple[int, ...]
    lexicon: dict[str, float]

    def score(self, texts: Sequence[str]) -> float:
        """The weight of the distinct words of its lexicon in some texts together."""
        said = frozenset().union(*map(content_words, texts)) if texts else frozenset()
        return sum(self.lexicon.get(word, 0.0) for word in said)


def choose_concepts(glosses: Sequence[str], texts: Sequence[str], count: int = CONCEPTS, least: int = LEADS) -> list[Concept]:
    """The commonest words of glosses that overlap little, chosen on training documents alone.

    Args:
        glosses: the one-line gloss of each training document.
        texts: their texts.
        count: at most so many.
        least: documents a word must have.
    """
    bags = [content_words(gloss) for gloss in glosses]
    bodies = [content_words(text) for text in texts]
    total = Counter(word for body in bodies for word in body)
    chosen: list[Concept] = []
    for word, number in sorted(Counter(word for bag in bags for word in bag).items(), key=lambda item: (-item[1], item[0])):
        documents = tuple(i for i, bag in enumerate(bags) if word in bag)
        apart = all(len(set(documents) & set(other.documents)) < 0.2 * len(documents) for other in chosen)
        if number >= least and apart and len(chosen) < count:
            chosen.append(Concept(word, documents, lexicon_of([bodies[i] for i in documents], total, len(bodies), word)))
    return chosen


def lexicon_of(bodies: Sequence[frozenset[str]], total: Counter, documents: int, name: str, size: int = LEXICON) -> dict[str, float]:
    """The words of highest log-odds in some documents against the rest (Dirichlet prior 0.5), the concept's own word among them."""
    inside = Counter(word for body in bodies for word in body)
    here, rest = len(bodies), documents - len(bodies)

    def log_odds(word: str) -> float:
        a, b = inside[word] + 0.5, total[word] - inside[word] + 0.5
        return float(np.log(a / (here + 1 - a)) - np.log(b / (rest + 1 - b)))

    known = sorted(((log_odds(word), word) for word, number in inside.items() if number >= max(2, here // 20)), reverse=True)[:size]
    lexicon = {word: odds for odds, word in known if odds > 0}
    return lexicon | {name: max(lexicon.get(name, 0.0), max(lexicon.values(), default=1.0))}


def winner(concepts: Sequence[Concept], texts: Sequence[str], before: Sequence[str] = ()) -> dict[int, float]:
    """How the point for naming a concept falls: to the one that scores highest, shared by ties; evenly to all where none is named.

    Args:
        texts: what was said.
        before: what was said of the same context without a planted direction; its score is subtracted.
    """
    scores = np.array([concept.score(texts) - concept.score(before) for concept in concepts])
    best = scores.max()
    if best <= 0:
        return {i: 1 / len(concepts) for i in range(len(concepts))}
    first = np.flatnonzero(scores == best)
    return {int(i): 1 / len(first) for i in first}


@dataclass
class Steering:
    """The subject with a vector added to the output of one block at every position but the first.

    Args:
        subject: which.
        block: after which the vector is added; before the block that is read.
    """

    subject: Subject
    block: int

    @torch.no_grad()
    def stream(self, ids_BC: Tensor) -> Tensor:
        """The residual stream ``[B, C, D]`` after the block, before anything is added."""
        (resid_BCD,) = self.subject.residuals(ids_BC, [self.block])
        return resid_BCD

    @torch.no_grad()
    def read(self, ids_BC: Tensor, vector_BD: Tensor) -> Tensor:
        """Activations ``[B, D]`` (float32) at the last position of contexts of one length, steered."""
        lm, positions = self.subject.lm, torch.arange(ids_BC.shape[1], device=ids_BC.device)[None]
        hidden_BCD = add(self.stream(ids_BC), vector_BD)
        with adapter(lm, None):
            return lm.run(hidden_BCD, self.block + 1, self.subject.layer_l + 1, positions)[:, -1].float()

    @torch.no_grad()
    def go_on(self, ids_BC: Tensor, vector_BD: Tensor, tokens: int = 20) -> Tensor:
        """The subject's own greedy continuation ``[B, tokens]`` under steering: its behaviour."""
        return self.subject.go_on(ids_BC, tokens, lambda hidden, positions: add(hidden, vector_BD, int(positions[0]) == 0), self.block)


def add(hidden_BCD: Tensor, vector_BD: Tensor, first: bool = True) -> Tensor:
    """Add a vector to every position; where ``first`` says that the context begins here, not to its first, which is a sink."""
    moved = hidden_BCD + vector_BD[:, None].to(hidden_BCD.dtype)
    return torch.cat([hidden_BCD[:, :1], moved[:, 1:]], dim=1) if first else moved


@torch.no_grad()
def direction(steering: Steering, contexts: Sequence[list[int]]) -> Tensor:
    """The mean ``[D]`` (float64) of a block's output over positions 8 to 40 of some contexts."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids in contexts:  # of different lengths; each is short
        part_CD = steering.stream(torch.tensor([ids[: LAST + 1]], device=steering.subject.device))[0, FIRST:].double().cpu()
        total, count = total + part_CD.sum(0), count + len(part_CD)
    return total / max(count, 1)
