"""Ways to choose an explanation. The activation is at hand, so a search may look for the words that rebuild it best.

A search is written as steps joined by +, e.g. ``best_of:16+swaps:2+price:0.02``. Each step adds texts to those found before it; the greedy
one is always among them. A new step is a class like those here, registered in :data:`SEARCHES` under the name by which it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megalens.evaluate import EvaluationError
from megalens.evaluate.measure import Cost, Said, Search, said
from megalens.evaluate.text import pad
from megalens.explain.candidates import AT_ONCE, Candidate, Candidates, chunks
from megalens.lens.lens import ConsistencyLens
from megalens.lens.sampling import Alone, Law
from megalens.ops import noise_keys


class Finder(Protocol):
    """A step of a search."""

    @property
    def name(self) -> str:
        """Stands beside every figure, e.g. ``best of 8``."""
        ...

    def __call__(self, found: Candidates) -> None:
        """Add texts to those found before."""
        ...


@dataclass(frozen=True)
class Greedy:
    """The most likely token at each place; a whole search."""

    name = "greedy"

    def __call__(self, lens: ConsistencyLens, a_BD: Tensor, row_B: Tensor) -> Said:
        """Explain activations ``[B, D]``."""
        ids_BT = lens.verbalize(a_BD)
        return replace(said(lens, ids_BT), costs=[Cost(said=ids_BT.shape[1])] * len(ids_BT))


@dataclass(frozen=True)
class Composed:
    """Steps in a row, the greedy explanation before them: a whole search. The text with the smallest score is chosen.

    The score is the distance of the unit-length vectors, squared, and ``price`` for each nat per token of the text under the untouched
    subject. A text that says nothing is chosen only where no other is there.

    A text depends on the lens, the activation and its row's number alone. A step never makes a row worse.
    """

    steps: tuple[Finder, ...]
    price: float = 0.0

    @property
    def name(self) -> str:
        """``best of 8 + swaps``, and the price where there is one."""
        return " + ".join([step.name for step in self.steps] + ([f"price {self.price:g}"] if self.price else []))

    @torch.no_grad()
    def __call__(self, lens: ConsistencyLens, a_BD: Tensor, row_B: Tensor) -> Said:
        """Explain activations ``[B, D]``."""
        found = Candidates(lens, a_BD, row_B, self.price)
        greedy_BT = lens.verbalize(a_BD)
        found.count_said(greedy_BT.shape[1])
        found.add(greedy_BT[:, None])
        for step in self.steps:
            step(found)
        return found.said()


@dataclass(frozen=True)
class BestOf:
    """``k`` explanations, the greedy one among them.

    Args:
        k: explanations for each row.
        noise: temperature at which all but the greedy one are sampled.

    A sample depends on the lens's seed, the row's number and its own number alone, so more of them never make a row worse.
    """

    k: int
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 2 or not 0 < self.noise < float("inf"):
            raise ValueError(f"best of {self.k} with noise {self.noise:g}: there must be at least 2 explanations, and noise above 0")

    @property
    def name(self) -> str:
        """``best of 8``, and the noise where it is not 1."""
        return f"best of {self.k}" + (f", noise {self.noise:g}" if self.noise != 1 else "")

    def __call__(self, found: Candidates) -> None:
        """Add the sampled ones."""
        found.add(sampled(found, range(1, self.k), self.noise))


@dataclass(frozen=True)
class Swaps:
    """Other tokens in the best text's places, one place after the other; the best text goes on to the next place.

    What is tried is the verbalizer's own: tokens that its other texts have in that place, those of the best texts first, and the likeliest
    ones behind the text so far. Half are of either kind where there are enough.

    Args:
        sweeps: times through the text. A text that was read before is not read again, so a sweep that finds nothing new reads little.
        tokens: tried in each place.
    """

    sweeps: int = 2
    tokens: int = 24

    def __post_init__(self) -> None:
        if self.sweeps < 1 or self.tokens < 1:
            raise ValueError(f"{self.sweeps} sweeps of {self.tokens} tokens: there must be at least one of either")

    @property
    def name(self) -> str:
        """``2 sweeps of swaps``, and the number of tokens where it is another than usual."""
        tokens = f", {self.tokens} tokens" if self.tokens != Swaps.tokens else ""
        return f"{self.sweeps} {'sweep' if self.sweeps == 1 else 'sweeps'} of swaps{tokens}"

    def __call__(self, found: Candidates) -> None:
        """Add what swaps find."""
        room = found.lens.frame.room
        for _ in range(self.sweeps):
            likeliest = self._likeliest(found)
            for place in range(room):
                texts = [(i, each.ids) for i, each in enumerate(found.best)]
                tokens = [self._tokens(found, i, place, likeliest[i]) for i in range(len(texts))]
                found.swap(texts, place, tokens, self.tokens, keep=True)

    def _likeliest(self, found: Candidates) -> list[list[list[int]]]:
        """The likeliest tokens in each place of the best texts, as said."""
        frame, verbalizer, device = found.lens.frame, found.lens.verbalizer, found.a_BD.device
        words_BW, lengths_B = pad([each.ids[: frame.room] for each in found.best])
        words_BW = torch.nn.functional.pad(words_BW, (0, frame.room - words_BW.shape[1])).to(device)
        ids_BT, _ = frame.put(words_BW, None if frame.end_id is None else lengths_B.to(device))
        count = min(self.tokens, found.lens.subject.lm.vocabulary.in_weight.shape[0])
        parts = [verbalizer.likeliest(found.a_BD[i : i + AT_ONCE], ids_BT[i : i + AT_ONCE], count) for i in range(0, len(ids_BT), AT_ONCE)]
        found.count_said(ids_BT.shape[1])
        return torch.cat(parts)[:, len(frame.before) :].tolist()

    def _tokens(self, found: Candidates, i: int, place: int, likeliest: list[list[int]]) -> list[int]:
        """What to try in a place of an activation's best text."""
        length = len(found.best[i].ids)
        at = found.spoken(place, length) if place < length else length
        if at >= min(length, found.lens.frame.room):
            return []
        ranked = sorted(found.drawn[i], key=lambda each: each.score)
        others = list(dict.fromkeys(each.ids[at] for each in ranked if len(each.ids) > at))[: self.tokens // 2]
        return list(dict.fromkeys(others + likeliest[at]))[: self.tokens]


@dataclass(frozen=True)
class Beam:
    """Beginnings of texts, longer by a token each time: of all that follow the best ones, the best go on, by what is rebuilt from them.

    Args:
        width: beginnings that go on.
        tokens: the verbalizer's likeliest ones that are tried behind each.
    """

    width: int
    tokens: int = 8

    def __post_init__(self) -> None:
        if self.width < 1 or self.tokens < 1:
            raise ValueError(f"a beam of {self.width} with {self.tokens} tokens: there must be at least one of either")

    @property
    def name(self) -> str:
        """``beam of 4``, and the number of tokens where it is another than usual."""
        return f"beam of {self.width}" + (f", {self.tokens} tokens" if self.tokens != Beam.tokens else "")

    def __call__(self, found: Candidates) -> None:
        """Add the texts that the last beginnings lead to."""
        room, last_first = found.lens.frame.room, found.lens.reconstructor.first_is_last
        beams: list[list[list[int]]] = [[[]] for _ in found.best]
        for length in range(room):
            texts = [(i, ids) for i, each in enumerate(beams) for ids in each]
            tokens = self._next(found, [ids for _, ids in texts])
            place = max(length - 1, 0) if last_first else length
            made = found.swap([(i, [*ids, 0]) for i, ids in texts], place, tokens, self.tokens, keep=length + 1 == room)
            longer: list[list[Candidate]] = [[] for _ in beams]
            for (i, _), each in zip(texts, made, strict=True):
                longer[i] += each
            beams = [self._best(each, old) for each, old in zip(longer, beams, strict=True)]

    def _best(self, longer: list[Candidate], old: list[list[int]]) -> list[list[int]]:
        """The best beginnings, always as many: where too few were found, the first old one with a token of no meaning."""
        best = [each.ids for each in sorted(longer, key=lambda each: each.score)[: self.width]]
        return best + [[*old[0], 0]] * (self.width - len(best))

    def _next(self, found: Candidates, beginnings: list[list[int]]) -> list[list[int]]:
        """The likeliest tokens behind each beginning, as many of each activation side by side."""
        frame, device, count = found.lens.frame, found.a_BD.device, len(beginnings) // len(found.a_BD)
        ids_NT = torch.tensor([[*frame.before, *ids, 0] for ids in beginnings], device=device)
        parts = []
        for rows in chunks(len(found.a_BD), count):
            here = ids_NT[rows.start * count : rows.stop * count]
            parts.append(found.lens.verbalizer.likeliest(found.a_BD[rows.start : rows.stop], here, self.tokens)[:, -1])
        found.count_said(count * ids_NT.shape[1])
        return torch.cat(parts).tolist()


def sampled(found: Candidates, draws: range, noise: float) -> Tensor:
    """Texts ``[B, K, T]`` of each activation, sampled at a temperature, and counted; ``draws`` are their numbers."""
    verbalizer, parts = found.lens.verbalizer, []
    for rows in chunks(len(found.a_BD), len(draws)):
        row_B = found.row_B[rows.start : rows.stop]
        draw_N = torch.arange(draws.start, draws.stop, device=row_B.device).repeat(len(row_B))
        keys = partial(noise_keys, found.lens.config.seed, 0, row_B.repeat_interleave(len(draws)), draw=draw_N)
        parts.append(verbalizer.sample(found.a_BD[rows.start : rows.stop], keys, len(draws), Law(noise), _ToTheEnd()).ids_NT)
    ids_BKT = torch.cat(parts).unflatten(0, (-1, len(draws)))
    found.count_said(ids_BKT[0].numel())
    return ids_BKT


class _ToTheEnd(Alone):
    """Ranks that share a lens's weights decode equally many tokens without asking each other when they do not stop early."""

    def any(self, flag: bool) -> bool:
        """Somebody goes on."""
        return True


class Asked(NamedTuple):
    """How a step is made of what follows its name, strings between colons; and how it is written, for messages."""

    make: Callable[..., Finder]
    usage: str


SEARCHES: dict[str, Asked] = {
    "best_of": Asked(
        lambda k, noise="1": BestOf(int(k), float(noise)),
        "best_of:K or best_of:K:NOISE with K at least 2 and NOISE above 0, e.g. best_of:8",
    ),
    "beam": Asked(lambda width, tokens="8": Beam(int(width), int(tokens)), "beam:WIDTH or beam:WIDTH:TOKENS"),
    "swaps": Asked(
        lambda sweeps="2", tokens="24": Swaps(int(sweeps), int(tokens)),
        "swaps or swaps:SWEEPS or swaps:SWEEPS:TOKENS",
    ),
}
"""By the name they are asked for."""


def search_named(spelling: str) -> Search:
    """The search that a spelling asks for, e.g. ``greedy``, ``best_of:8`` or ``best_of:16+swaps:2+price:0.02``.

    Raises:
        EvaluationError: there is none of this name, or its arguments make no sense.
    """
    if spelling == "greedy":
        return Greedy()
    steps, prices = [], []
    try:
        for part in spelling.split("+"):
            name, *arguments = part.split(":")
            if name == "price":
                prices.append(_price(*arguments))
            else:
                steps.append(SEARCHES[name].make(*arguments))
        if not steps or len(prices) > 1:
            raise ValueError(spelling)
    except (KeyError, TypeError, ValueError):
        usages = ["greedy", *(asked.usage for asked in SEARCHES.values())]
        raise EvaluationError(
            f"'{spelling}' is no search; write {', or '.join(usages)}; or several of these joined by +, at the end of which "
            "price:X may stand, X being what a nat per token costs"
        ) from None
    return Composed(tuple(steps), *prices)


def searches_named(spellings: str) -> list[Search]:
    """The searches of ``evaluation.search``: spellings between commas, one at least.

    Raises:
        EvaluationError: one is no search.
    """
    return [search_named(spelling.strip()) for spelling in spellings.split(",")]


def _price(price: str) -> float:
    if not 0 <= float(price) < float("inf"):
        raise ValueError(price)
    return float(price)
