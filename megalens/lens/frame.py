"""Where a text begins and ends among the tokens that a verbalizer says: its end token, and the tags around it.

Without an end token every text has exactly ``t_text`` tokens, and all of them are read. With one, a text is what stands before the first
end token; one that never says it is unfinished. With tags only what stands between them is the explanation; a text that is unfinished,
or has no such tags, has failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megalens.config import Config, ConfigError
from megalens.lens.prompts import end_id_of
from megalens.lens.text import lengths_of


@dataclass(frozen=True)
class Explained:
    """Which of a text's tokens are its explanation.

    Args:
        lengths_B: how many; None: all T. 0 where the text has failed.
        first_B: the index of the first; None: 0.
        failed_B: texts that are unfinished or have no tags; None: none can be.
    """

    lengths_B: Tensor | None = None
    first_B: Tensor | None = None
    failed_B: Tensor | None = None

    def of(self, x_BT: Tensor) -> Tensor:
        """The explanation's share of something that each token has, ``[B, T, ...]``, moved to the front; T stays."""
        if self.first_B is None:
            return x_BT
        place = torch.arange(x_BT.shape[1], device=x_BT.device)[None]
        source_BT = (place + self.first_B[:, None]).clamp_max(x_BT.shape[1] - 1)
        return x_BT.gather(1, source_BT.view(*source_BT.shape, *[1] * (x_BT.dim() - 2)).expand_as(x_BT))


class Frame:
    """What stands around an explanation in a text.

    Args:
        config: ``verbalizer.end_token``, ``verbalizer.tag`` and ``t_text``.
        tokenizer: the subject's.

    Attributes:
        end_id: the end token's id; None: texts have a fixed length.
        before, behind: token ids of the opening and of the closing tag; empty without tags.
        room: the most tokens that an explanation can have.

    Raises:
        ConfigError: ``t_text`` leaves no token for the explanation, or the end is no single token.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.tag, self.t_text = tokenizer, config.verbalizer.tag, config.t_text
        self.end_id = end_id_of(config, tokenizer)
        tags = (f"<{self.tag}>\n", f"\n</{self.tag}>") if self.tag else ("", "")
        self.before, self.behind = ([*tokenizer(tag, add_special_tokens=False)["input_ids"]] if tag else [] for tag in tags)
        around = len(self.before) + len(self.behind) + (self.end_id is not None)
        self.room = self.t_text - around
        if self.room < 1:
            raise ConfigError(f"t_text={self.t_text} leaves no token for the text: its end and its tags take {around}; raise it")

    def lengths(self, ids_BT: Tensor) -> Tensor | None:
        """Tokens of each text ``[B]`` before its end token; None where texts have a fixed length."""
        return None if self.end_id is None else lengths_of(ids_BT, self.end_id)

    def put(self, words_BW: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is to be said to give explanations: tags around them, the end token behind.

        Args:
            words_BW: right-padded ids, at most :attr:`room` of each row.
            lengths_B: how many of each; None: all, where texts have a fixed length.

        Returns:
            ids and the lengths of the texts, without the end token.
        """
        if self.end_id is None or lengths_B is None:
            return words_BW, lengths_B
        reach = words_BW.shape[1] + self.t_text - self.room
        place = torch.arange(reach, device=words_BW.device)[None] - len(self.before)
        ids_BT = words_BW.gather(1, place.clamp(0, words_BW.shape[1] - 1).expand(len(words_BW), -1))
        for index, number in enumerate(self.before, -len(self.before)):
            ids_BT = torch.where(place == index, number, ids_BT)
        for index, number in enumerate(self.behind):
            ids_BT = torch.where(place == lengths_B[:, None] + index, number, ids_BT)
        last_B = lengths_B + len(self.behind)
        return torch.where(place >= last_B[:, None], self.end_id, ids_BT), last_B + len(self.before)

    def counted(self, lengths_B: Tensor, reach: int, weight_BW: Tensor | None = None) -> Tensor:
        """The weight of each token of what :meth:`put` gives, ``[B, reach]``: 1 for tags and the end token, 0 behind it.

        Args:
            lengths_B: how many words each explanation has.
            weight_BW: the words' weights; None: 1.
        """
        place = torch.arange(reach, device=lengths_B.device)[None] - len(self.before)
        last_B1 = lengths_B[:, None] + len(self.behind)
        counts_BT = place < last_B1 if self.end_id is None else place <= last_B1
        if weight_BW is None:
            return counts_BT
        word_BT = weight_BW.gather(1, place.clamp(0, weight_BW.shape[1] - 1).expand(len(weight_BW), -1))
        is_word_BT = (place >= 0) & (place < lengths_B[:, None])
        return counts_BT * torch.where(is_word_BT, word_BT, 1.0)

    def explained(self, ids_BT: Tensor, lengths_B: Tensor | None) -> Explained:
        """Which tokens of said texts are their explanations."""
        if self.tag is None or lengths_B is None or ids_BT.is_meta:
            return Explained(lengths_B)
        rows = zip(ids_BT.tolist(), lengths_B.tolist(), strict=True)
        spans = [self._span(ids[:length]) if length < len(ids) else None for ids, length in rows]
        first_B, stop_B = torch.tensor([span or (0, 0) for span in spans], device=ids_BT.device).unbind(1)
        return Explained(stop_B - first_B, first_B, stop_B == first_B)

    def says_nothing(self, ids_NT: Tensor, count_N: Tensor) -> Tensor:
        """Which texts hold nothing but white space and special tokens among their first ``count`` tokens ``[N]``."""
        if ids_NT.is_meta:
            return torch.zeros_like(count_N, dtype=torch.bool)
        blank_NT = self._blank_V.to(ids_NT.device)[ids_NT.clamp_max(len(self._blank_V) - 1)]
        return (blank_NT | (torch.arange(ids_NT.shape[1], device=ids_NT.device) >= count_N[:, None])).all(1)

    @cached_property
    def _blank_V(self) -> Tensor:
        """Which tokens show nothing; the last entry is for ids that the tokenizer has not."""
        shown = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))], skip_special_tokens=True)
        return torch.tensor([*(not text.strip() for text in shown), True])

    def explanation(self, text: str) -> str:
        """What stands between the tags of a finished text, stripped; empty where it has failed. Without tags, the text."""
        if self.tag is None:
            return text
        found = self._find(text)
        return found.group(1).strip() if found else ""

    def _find(self, text: str) -> re.Match[str] | None:
        return re.search(f"<{self.tag}>(.*?)</{self.tag}>", text, re.DOTALL)

    def _span(self, ids: list[int]) -> tuple[int, int] | None:
        """The tokens that lie between the tags whole, without blanks at both ends."""
        whole = self._decode(ids)
        found = self._find(whole)
        if found is None or not found.group(1).strip():
            return None
        words = found.group(1)
        begin, end = found.start(1) + len(words) - len(words.lstrip()), found.start(1) + len(words.rstrip())

        def tokens_up_to(place: int) -> int:
            return _first(len(ids), lambda n: self._decode(ids[:n]).startswith(whole[:place]))

        first = max(tokens_up_to(found.start(1)), _first(len(ids), lambda n: len(self._decode(ids[:n])) > begin) - 1)
        stop = tokens_up_to(end)
        stop -= len(self._decode(ids[:stop])) > found.end(1)  # a token that reaches into the closing tag
        return (first, stop) if first < stop else None

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) if ids else ""


def _first(most: int, holds: Callable[[int], bool]) -> int:
    """The least number of ``0 .. most`` for which something holds that goes on holding; ``most`` where it never does."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
