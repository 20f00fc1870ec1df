"""Explanations as text: what a reader is given, and what the reconstructor may read. Only what survives as a string counts."""

from __future__ import annotations

import unicodedata

import torch
from torch import Tensor

_PICTURES = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def to_texts(tokenizer, ids_BT: Tensor) -> list[str]:
    """The strings of right-open token rows; special tokens are no text and vanish."""
    return tokenizer.batch_decode(ids_BT.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def to_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of strings, nothing put before or behind; the name of a special token inside a string is plain text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[B, T]`` and lengths ``[B]``; T is the longest row's, 0 when all are empty."""
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids_BT = torch.zeros(len(rows), int(lengths_B.max()) if rows else 0, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids_BT, lengths_B


def is_text(text: str) -> bool:
    """Does a string say anything: more than white space and replacement characters (bytes that decode to nothing)?"""
    return bool(text.replace("\ufffd", "").strip())


def round_trips(tokenizer, ids_BT: Tensor, texts: list[str]) -> list[bool]:
    """Which rows are, token for token, what their own string is tokenised to."""
    return [row == again for row, again in zip(ids_BT.tolist(), to_ids(tokenizer, texts), strict=True)]


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, spaces kept; joined, they are the text of all.

    A token that ends inside a character is empty, and the one that completes it holds the character.
    """
    result, start, said = [], 0, 0  # the window begins at a token that is already written, so that its leading space is not lost
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:said])
        text = _decode(tokenizer, ids[start:end])
        whole = len(text) > len(before) and (end == len(ids) or not text.endswith("\ufffd"))
        result.append(text[len(before) :] if whole else "")
        if whole:
            start, said = said, end
    return result


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


def visible(text: str) -> str:
    """A string that can be printed on one line of any terminal or page: control and direction-changing characters become signs."""
    return "".join(_PICTURES.get(c, "\ufffd" if _is_control(c) else c) for c in text)


def _is_control(character: str) -> bool:
    joiners = "\u200c\u200d"  # Persian and emoji need them
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in joiners
