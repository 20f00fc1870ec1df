"""What the server asks of the lens. All of it runs on the one thread that owns the model (:mod:`megalens.serve.worker`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalens.api import Lens
from megalens.evaluate.measure import read_by_lens
from megalens.evaluate.metrics import row_fve, row_statistics, unit
from megalens.evaluate.text import pad, to_ids, to_texts
from megalens.evaluate.trust.consensus import agreement
from megalens.evaluate.trust.words import content_words
from megalens.explain.candidates import chunks
from megalens.explain.edit import Patched, patch
from megalens.explain.search import search_named
from megalens.lens.prompts import window_of
from megalens.lens.sampling import Law
from megalens.ops import noise_keys
from megalens.serve.limits import Limits, Refused
from megalens.serve.tokens import Encoded, decode, encode

if TYPE_CHECKING:  # pages that need no server need no pydantic
    from megalens.serve.schema import Saying, Shared

Tell = Callable[[int, str], None]
SHOWN = 5  # likeliest tokens of the logit lens
AT_ONCE = 64  # texts that the reconstructor reads at once
PROGRESS_EVERY = 4  # tokens
STRANGERS = (
    "The lighthouse keeper wrote down the weather every evening before he lit the lamp.",
    "In chemistry, a catalyst makes a reaction faster and is not used up by it.",
    "def total(prices): return sum(price for price in prices if price > 0)",
    "She sold the bakery in 1987 and moved to the coast with two dogs and a piano.",
)
"""Texts whose explanations stand for those of any other activation."""


@dataclass(frozen=True)
class Row:
    """An activation to explain.

    Args:
        a_D: float32.
        number: numbers its noise; a position, or a place among vectors.
        seed: of its samples.
        tail: the last tokens of its context; None: it comes without one.
    """

    a_D: Tensor
    number: int
    seed: int
    tail: tuple[int, ...] | None = None


@dataclass
class Told:
    """An explanation and what it is worth; ``extra`` is what stands under ``megalens``."""

    description: str
    mse: float
    cosine_similarity: float
    extra: dict = field(default_factory=dict)


@dataclass
class Context:
    """A text that was read: its tokens, the positions that are asked for, and the activations there ``[P, D]``."""

    encoded: Encoded
    positions: list[int]
    a_PD: Tensor


class Reader:
    """A lens, used by one thread.

    Args:
        lens: nobody else uses it meanwhile.
        limits: of texts and positions.
    """

    def __init__(self, lens: Lens, limits: Limits):
        self.lens, self.module, self.limits = lens, lens.module, limits
        self.tokenizer, self.width = lens.module.tokenizer, lens.module.subject.d
        self.device = lens.module.mean.device
        self._strangers_MD = self._explained_strangers()

    # --------------------------------------------------------------------------------------------------------- reading

    def encode(self, asked: Shared, room: int = 0) -> Encoded:
        """Tokens of a request's text.

        Args:
            room: for tokens behind it.

        Raises:
            Refused: there is none, or it does not fit the subject's window.
        """
        encoded = encode(self.tokenizer, asked, self.limits)
        if not encoded.ids:
            raise Refused(400, "No tokens extracted")
        window, length = window_of(self.module.subject.lm.config), len(encoded.ids) + room
        if window is not None and length > window:
            raise Refused(400, f"The text has {length} tokens{' with its continuation' if room else ''}, more than the window of {window}.")
        return encoded

    @torch.no_grad()
    def read(self, asked: Shared, wanted: Sequence[int] | None, reverse: bool = False) -> Context:
        """The activations of a request's text.

        Args:
            wanted: Python indices; None or none: all.
            reverse: the last first.

        Raises:
            Refused: as of :meth:`encode`; a position is out of range, or there are too many.
        """
        encoded = self.encode(asked)
        count, most = len(encoded.ids), self.limits.max_positions_per_request
        for position in wanted or ():
            if not -count <= position < count:
                raise Refused(400, f"Position {position} out of range (0..{count - 1})")
        positions = [position % count for position in wanted] if wanted else list(range(count))
        if len(positions) > most:
            raise Refused(400, f"The text has {count} tokens, more than {most} (max_positions_per_request); name `positions`.")
        positions = positions[::-1] if reverse else positions
        ids_1C = torch.tensor([encoded.ids], device=self.device)
        return Context(encoded, positions, self.module.subject.residual(ids_1C)[0, positions].float())

    def rows(self, context: Context, seed: int) -> list[Row]:
        """The rows of a text's positions."""
        reach, ids = self.module.config.t_text + 1, context.encoded.ids
        tails = [tuple(ids[max(0, position + 1 - reach) : position + 1]) for position in context.positions]
        found = zip(context.a_PD, context.positions, tails, strict=True)
        return [Row(a_D, position, seed, tail) for a_D, position, tail in found]

    def vectors(self, activations: Sequence[Sequence[float]]) -> Tensor:
        """A client's vectors ``[N, D]``.

        Raises:
            Refused: of another length, not finite, or zero.
        """
        for vector in activations:
            if len(vector) != self.width:
                raise Refused(400, f"Vector length {len(vector)} != d_model {self.width}")
        a_ND = torch.tensor(activations, dtype=torch.float32, device=self.device)
        if not bool(a_ND.isfinite().all()):
            raise Refused(400, "A vector is not finite in float32")
        if not bool((a_ND.norm(dim=-1) > 0).all()):
            raise Refused(400, "A vector is zero: it has no direction")
        return a_ND

    # ---------------------------------------------------------------------------------------------------------- saying

    @torch.no_grad()
    def say(self, rows: Sequence[Row], saying: Saying, tell: Tell) -> list[Told]:
        """Explain rows that are asked for in the same way; the rows' own seeds count."""
        a_BD = torch.stack([row.a_D for row in rows])
        search, reads = search_named(saying.search), [0] * len(rows)
        if saying.search == "greedy":
            texts = self._texts(self._drawn(rows, range(1), saying.temperature, tell)[:, 0], saying.max_new_tokens)
            how = "greedy" if saying.temperature == 0 else f"sampled at {saying.temperature:g}"
        else:
            numbers = [row.number + (row.seed << 20) for row in rows]
            found = search(self.module, a_BD, torch.tensor(numbers, device=self.device))
            texts, how, reads = found.texts, search.name, [cost.reads for cost in found.costs]
        told = self.beside(texts, rows)
        for each, row, count in zip(told, rows, reads, strict=True):
            each.extra |= {"search": how, "seed": row.seed, "reads": count}
        if saying.k:
            for each, samples in zip(told, self.sample(rows, saying, first=1), strict=True):
                each.extra |= samples
        return told

    def beside(self, texts: Sequence[str], rows: Sequence[Row]) -> list[Told]:
        """What texts are worth for their rows, beside copies and the texts of strangers."""
        a_BD = torch.stack([row.a_D for row in rows])
        told = self.score(texts, a_BD)
        self._beside_copies(told, rows, a_BD)
        self._beside_strangers(told, a_BD)
        return told

    @torch.no_grad()
    def sample(self, rows: Sequence[Row], saying: Saying, first: int = 0) -> list[dict]:
        """``k`` samples of each row with their FVE, and how much their words agree: a number between 0 and 1, None for one sample.

        At temperature 1 where the request's is 0.
        """
        ids_BKT = self._drawn(rows, range(first, first + saying.k), saying.temperature or 1.0, lambda *_: None)
        texts = [self._texts(ids_KT, saying.max_new_tokens) for ids_KT in ids_BKT]
        a_ND = torch.stack([row.a_D for row in rows]).repeat_interleave(saying.k, 0)
        told = iter(self.score([text for each in texts for text in each], a_ND))
        found = []
        for each in texts:
            samples = [{"text": text, "fve": next(told).extra["fve"]} for text in each]
            words = [content_words(text) for text in each]
            found.append({"samples": samples, "agreement": agreement(words) if saying.k > 1 else None})
        return found

    @torch.no_grad()
    def score(self, texts: Sequence[str], a_ND: Tensor) -> list[Told]:
        """What texts are worth for activations ``[N, D]``, one each; one that says nothing counts as the mean activation."""
        told = []
        for at in range(0, len(texts), AT_ONCE):
            some, a_BD = list(texts[at : at + AT_ONCE]), a_ND[at : at + AT_ONCE]
            rebuild = read_by_lens(self.module, some)
            rows = row_statistics(a_BD, rebuild.a_hat_BD, self.lens.statistics, rebuild.failed_B)
            columns = zip(some, rows["cos"].tolist(), row_fve(rows).tolist(), rows["failed"].tolist(), strict=True)
            told += [Told(text, 2 * (1 - cos), cos, {"fve": fve, "failed": bool(failed)}) for text, cos, fve, failed in columns]
        for each, norm in zip(told, a_ND.norm(dim=-1).tolist(), strict=True):
            each.extra |= {"norm": norm, "usual_norm": self.lens.norm}
        return told

    @torch.no_grad()
    def logit_lens(self, a_PD: Tensor) -> list[list[tuple[str, float]]]:
        """The likeliest next tokens if the subject ended after block ``layer_l``, with their probabilities, for each activation."""
        lm = self.module.subject.lm
        top = lm.logits(lm.final_norm(a_PD.to(lm.dtype))).float().softmax(-1).topk(SHOWN)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [[(decode(self.tokenizer, [i]), p) for i, p in zip(*row, strict=True)] for row in rows]

    @torch.no_grad()
    def drops(self, text: str, a_D: Tensor) -> list[dict]:
        """What FVE goes with each phrase of a text: ``start`` and ``end`` of the phrase, and ``delta_fve``, what is lost without it."""
        spans = phrases(text)
        if len(spans) < 2:
            return []
        without = [text[:start] + text[end:] for start, end in spans]
        whole, *rest = (each.extra["fve"] for each in self.score([text, *without], a_D.expand(len(spans) + 1, -1)))
        return [{"start": start, "end": end, "delta_fve": whole - fve} for (start, end), fve in zip(spans, rest, strict=True)]

    @torch.no_grad()
    def steer(self, ids: list[int], position: int, text: str, weight: float, tokens: int) -> tuple[Patched, Told]:
        """Let the subject go on with ``a + weight * (rebuild - a)`` in the place of ``a``."""
        a_D = self.module.subject.residual(torch.tensor([ids], device=self.device))[0, position].float()
        rebuilt_D = read_by_lens(self.module, [text]).a_hat_BD[0]
        done = patch(self.module, ids, position, a_D + weight * (rebuilt_D - a_D), tokens)
        return done, self.score([text], a_D[None])[0]

    # --------------------------------------------------------------------------------------------------------- within

    def _drawn(self, rows: Sequence[Row], draws: range, temperature: float, tell: Tell) -> Tensor:
        """Texts ``[B, K, T]``, greedy at temperature 0; a row's depend on its own number, seed and draw alone."""
        parts = []
        for part in chunks(len(rows), len(draws)):
            some = rows[part.start : part.stop]
            number_N = torch.tensor([row.number for row in some for _ in draws], device=self.device)
            seed_N = torch.tensor([row.seed for row in some for _ in draws], device=self.device)
            draw_N = torch.tensor([draw for _ in some for draw in draws], device=self.device)

            def keys(token: int, number_N=number_N, seed_N=seed_N, draw_N=draw_N) -> Tensor:
                key_N = torch.empty_like(number_N)
                for seed in seed_N.unique().tolist():
                    own_N = seed_N == seed
                    key_N[own_N] = noise_keys(self.module.config.seed, seed, number_N[own_N], token, draw_N[own_N])
                return key_N

            watch = self._watch(part.start, tell) if len(draws) == 1 else None
            a_BD = torch.stack([row.a_D for row in some])
            sampled = self.module.verbalizer.sample(a_BD, keys, len(draws), Law(temperature), watch=watch)
            parts.append(sampled.ids_NT.unflatten(0, (-1, len(draws))))
        return torch.cat(parts)

    def _watch(self, first: int, tell: Tell) -> Callable[[Tensor], None]:
        """Tells each row's text so far, tags included, every few tokens."""
        said: list[Tensor] = []

        def watch(ids_N: Tensor) -> None:
            said.append(ids_N)
            if len(said) % PROGRESS_EVERY == 0 or len(said) == 1:
                ids_NT = torch.stack(said, 1)
                for index, text in enumerate(to_texts(self.tokenizer, ids_NT, self.module.frame.lengths(ids_NT))):
                    tell(first + index, text)

        return watch

    def _texts(self, ids_NT: Tensor, most: int) -> list[str]:
        """Explanations as strings: what stands behind the opening tag, up to the closing one if there is one; without tags, all."""
        ids_NT, tag = ids_NT[:, :most], self.module.frame.tag
        texts = to_texts(self.tokenizer, ids_NT, self.module.frame.lengths(ids_NT))
        return [_between(text, tag) for text in texts] if tag else texts

    def _beside_copies(self, told: list[Told], rows: Sequence[Row], a_BD: Tensor) -> None:
        """``fve_copy``: of the context's last tokens, as many as the text has."""
        at = [i for i, row in enumerate(rows) if row.tail is not None]
        if not at:
            return
        counts = [max(1, min(len(ids), self.module.frame.room)) for ids in to_ids(self.tokenizer, [told[i].description for i in at])]
        ids_BC, lengths_B = pad([list(rows[i].tail or ()) for i in at])
        batch = {"input_ids": ids_BC.to(self.device), "position": lengths_B.to(self.device) - 1}
        tails = self.module.tails(batch, torch.tensor(counts, device=self.device))  # type: ignore[arg-type]
        copies = self.score(to_texts(self.tokenizer, *tails), a_BD[at])
        for i, copy in zip(at, copies, strict=True):
            told[i].extra |= {"fve_copy": copy.extra["fve"], "copy": copy.description}

    def _beside_strangers(self, told: list[Told], a_BD: Tensor) -> None:
        """``fve_shuffled``: the mean FVE of other activations' explanations here; its 95th percentile; and the ``verdict``."""
        u_BD = unit(a_BD.double().cpu().numpy())
        spread_B1 = np.square(u_BD - self.lens.statistics.mean_normalised.double().cpu().numpy()).sum(-1, keepdims=True)
        fve_BM = 1 - (2 - 2 * u_BD @ self._strangers_MD.T) / spread_B1
        for each, fve_M in zip(told, fve_BM, strict=True):
            high, fve = float(np.quantile(fve_M, 0.95)), each.extra["fve"]
            verdict = "chance" if fve <= high else "above chance" if fve <= each.extra.get("fve_copy", np.inf) else "better than a copy"
            each.extra |= {"fve_shuffled": float(fve_M.mean()), "fve_shuffled_p95": high, "verdict": verdict}

    @torch.no_grad()
    def _explained_strangers(self) -> np.ndarray:
        """Rebuilds ``[M, D]``, of unit length, of explanations of :data:`STRANGERS`."""
        found = []
        for text in STRANGERS:
            ids = self.tokenizer(text)["input_ids"][:64]
            a_CD = self.module.subject.residual(torch.tensor([ids], device=self.device))[0, 3::2].float()
            found += self._texts(self.module.verbalize(a_CD), self.module.config.t_text)
        rebuild = read_by_lens(self.module, found)
        said_B = ~rebuild.failed_B if bool((~rebuild.failed_B).any()) else rebuild.failed_B
        return unit(rebuild.a_hat_BD[said_B].double().cpu().numpy())


def phrases(text: str, most: int = 16) -> list[tuple[int, int]]:
    """The phrases of a text as character spans: runs of words up to a comma, stop or line break; single words where there is but one.

    A text with more than ``most`` is cut into that many runs.
    """
    words, at = [], 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        words.append((start, at))
    spans, first = [], 0
    for i, (start, end) in enumerate(words):
        gap = text[end : words[i + 1][0]] if i + 1 < len(words) else "\n"
        if text[start:end][-1] in ",.;:!?" or "\n" in gap:
            spans.append((words[first][0], end))
            first = i + 1
    spans = spans if len(spans) > 1 else words
    size = -(-len(spans) // most) if spans else 1
    return [(spans[i][0], spans[min(i + size, len(spans)) - 1][1]) for i in range(0, len(spans), size)]


def _between(text: str, tag: str) -> str:
    _, opened, rest = text.partition(f"<{tag}>")
    return rest.partition(f"</{tag}>")[0].strip() if opened else text.strip()
