"""The texts that a search has found for some activations, what each scores, and what finding them took.

How often the lens is called depends on how many activations there are, never on their texts: ranks that share a lens's weights can search
for different activations side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalens.evaluate.measure import Cost, Said, nats_per_token, said
from megalens.evaluate.metrics import normalised_error
from megalens.evaluate.text import is_text, pad, to_ids, to_texts
from megalens.lens.lens import ConsistencyLens

AT_ONCE = 512  # texts that one call of the lens is given


@dataclass
class Candidate:
    """A text that was found.

    Args:
        text: the string.
        ids: its tokens, read back from the string.
        round_trips: are these the tokens that were said?
        unfinished: did it not end within ``t_text`` tokens?
        score: what it was scored; the smaller, the better.
    """

    text: str
    ids: list[int]
    round_trips: bool = True
    unfinished: bool = False
    score: float = float("inf")


class Candidates:
    """The texts found so far for activations ``[B, D]``.

    A text's score is the squared distance of activation and rebuild, both at unit length, and the price of its language. It is infinite
    where the text says nothing, or its rebuild is not finite.

    Args:
        lens: with its subject.
        a_BD: the activations.
        row_B: their numbers (int64), for the noise of draws.
        price: of a nat per token under the untouched subject behind its plain prompt.

    Attributes:
        drawn: the texts that were added, for each activation, in their order.
        best: for each activation the best of all that were added or kept; the earlier of two equal ones.
    """

    def __init__(self, lens: ConsistencyLens, a_BD: Tensor, row_B: Tensor, price: float = 0.0):
        self.lens, self.price = lens, price
        self.a_BD, self.row_B = a_BD.to(lens.mean.device), row_B.to(lens.mean.device)
        self.drawn: list[list[Candidate]] = [[] for _ in a_BD]
        self.best: list[Candidate] = []
        self._scores: list[dict[str, float]] = [{} for _ in a_BD]  # of every text that was read, so that none is read twice
        self._reads, self._said, self._priced = (np.zeros(len(a_BD), dtype=np.int64) for _ in range(3))

    def add(self, ids_BKT: Tensor) -> None:
        """Score K texts of each activation that the verbalizer said: as a reader meets them, their strings tokenised again."""
        count, spoken = ids_BKT.shape[1], said(self.lens, ids_BKT.flatten(0, 1))
        texts, read = spoken.texts, to_ids(self.lens.tokenizer, spoken.texts)
        made = [Candidate(*each) for each in zip(texts, read, spoken.round_trips, spoken.unfinished, strict=True)]
        self.best = self.best or made[::count]
        for rows in chunks(len(self.a_BD), count):
            fresh: dict[tuple[int, str], Candidate] = {}
            for k in range(rows.start * count, rows.stop * count):
                if texts[k] not in self._scores[k // count]:
                    fresh.setdefault((k // count, texts[k]), made[k])
            a_hat_ND = self.lens.reconstruct(*pad([each.ids for each in fresh.values()] or [[]]))
            self._score([(i, each) for (i, _), each in fresh.items()], a_hat_ND, keep=True)
        for k, each in enumerate(made):
            each.score = self._scores[k // count][each.text]
            self.drawn[k // count].append(each)

    def swap(
        self, texts: Sequence[tuple[int, list[int]]], place: int, tokens: Sequence[Sequence[int]], most: int, keep: bool
    ) -> list[list[Candidate]]:
        """Score texts with other tokens at one place. What stands before it is read once.

        Only such count as are text and are tokenised to themselves, and as were not read before.

        Args:
            texts: an activation's number in this batch, and token ids, for each text.
            place: in the order of reading; a text that ends before it is left as it is.
            tokens: those to try in each text.
            most: no more tokens are tried in any text.
            keep: may the new texts become the best ones? Then only those are priced that may.

        Returns:
            the new texts that each text gave.
        """
        found: list[list[Candidate]] = [[] for _ in texts]
        for groups in chunks(len(texts), most):
            tried = self._swapped(texts, place, tokens, groups)
            swaps = [(g - groups.start, token) for g, token, _ in tried] or [(0, 0)]
            ids_GT, lengths_G = pad(
                [(ids + [0] * place)[: max(len(ids), place + 1)] or [0] for _, ids in texts[groups.start : groups.stop]]
            )
            group_N, token_N = torch.tensor(swaps).unbind(1)
            a_hat_ND = self.lens.reconstruct_swaps(ids_GT, lengths_G, place, group_N, token_N)
            self._score([(texts[g][0], each) for g, _, each in tried], a_hat_ND, keep)
            for g, _, each in tried:
                found[g].append(each)
        return found

    def spoken(self, place: int, length: int) -> int:
        """Where the token is said that is read at ``place`` of a text of ``length`` tokens."""
        return (place + 1) % length if self.lens.reconstructor.first_is_last else place

    def count_said(self, tokens: int) -> None:
        """Count tokens that the verbalizer decoded or scored for each activation."""
        self._said += tokens

    def said(self) -> Said:
        """The best texts."""
        costs = [Cost(*map(int, each)) for each in zip(self._reads, self._said, self._priced, strict=True)]
        best = self.best
        return Said([each.text for each in best], [each.round_trips for each in best], [each.unfinished for each in best], costs)

    def _swapped(
        self, texts: Sequence[tuple[int, list[int]]], place: int, tokens: Sequence[Sequence[int]], groups: range
    ) -> list[tuple[int, int, Candidate]]:
        """Texts to read: of which group, with which token."""
        made = []
        for g in groups:
            ids = texts[g][1]
            if place < len(ids):
                at = self.spoken(place, len(ids))
                made += [(g, token, [*ids[:at], token, *ids[at + 1 :]]) for token in tokens[g]]
        tokenizer = self.lens.tokenizer
        strings = to_texts(tokenizer, *pad([ids for *_, ids in made])) if made else []
        read = to_ids(tokenizer, strings)
        tried = []
        for (g, token, ids), text, again in zip(made, strings, read, strict=True):
            if ids == again and is_text(text) and text not in self._scores[texts[g][0]]:
                tried.append((g, token, Candidate(text, ids)))
        return tried

    def _score(self, fresh: list[tuple[int, Candidate]], a_hat_ND: Tensor, keep: bool) -> None:
        """Score texts by their rebuilds ``[N, D]`` (the first N that there are)."""
        rows = [i for i, _ in fresh]
        a_hat_ND = a_hat_ND[: len(rows)]
        usable_N = a_hat_ND.isfinite().all(-1).cpu().numpy() & np.array([is_text(each.text) for _, each in fresh], dtype=bool)
        score_N = np.where(usable_N, normalised_error(self.a_BD[rows], a_hat_ND), np.inf)
        np.add.at(self._reads, rows, 1)
        if self.price:
            worth = [n for n, (i, each) in enumerate(fresh) if score_N[n] < (self.best[i].score if keep else np.inf)]
            nats = nats_per_token(self.lens, [fresh[n][1].ids for n in worth])
            np.add.at(self._priced, [rows[n] for n in worth], 1)
            priced = score_N[worth] + self.price * nats
            score_N[:] = np.inf
            score_N[worth] = priced
        for (i, each), score in zip(fresh, score_N.tolist(), strict=True):
            each.score = self._scores[i][each.text] = score
            if keep and score < self.best[i].score:
                self.best[i] = each


def chunks(count: int, width: int) -> list[range]:
    """``count`` things in ranges of which ``width`` texts each make a call of the lens."""
    step = max(1, AT_ONCE // width)
    return [range(start, min(count, start + step)) for start in range(0, count, step)]
