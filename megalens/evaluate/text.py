"""Token ids to strings and back. An explanation is measured as the string that a reader sees, tokenised again."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megalens.evaluate import EvaluationError

NO_TEXT = "the text holds bytes that are no UTF-8; convert it first, e.g. iconv -f latin1 -t utf-8"


def check_text(text: str) -> None:
    """Refuse a string that no tokenizer takes.

    Raises:
        EvaluationError: it is empty, or holds lone surrogates, which is what Python makes of bytes that are no UTF-8.
    """
    if not text:
        raise EvaluationError("the text is empty; give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise EvaluationError(NO_TEXT)


def to_texts(tokenizer: PreTrainedTokenizerBase, ids_BT: Tensor, lengths_B: Tensor | None = None) -> list[str]:
    """The string of each row of tokens, special tokens left out; ``lengths_B``: of its first tokens alone."""
    return tokenizer.batch_decode(rows_of(ids_BT, lengths_B), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def rows_of(ids_BT: Tensor, lengths_B: Tensor | None = None) -> list[list[int]]:
    """Right-padded ids as lists; :func:`pad`'s way back."""
    rows = ids_BT.tolist()
    return rows if lengths_B is None else [row[:length] for row, length in zip(rows, lengths_B.tolist(), strict=True)]


def to_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of strings, without BOS or EOS. The name of a special token inside a string is plain text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids ``[B, T]`` and lengths ``[B]``. T is the longest row's, at least 1: empty texts run the same blocks as others."""
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids_BT = torch.zeros(len(rows), max([1, *map(len, rows)]), dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids_BT, lengths_B


def is_text(text: str) -> bool:
    """Does a string hold more than white space and replacement characters (bytes that are no text)?"""
    return bool(text.replace("\ufffd", "").strip())


def round_trips(tokenizer: PreTrainedTokenizerBase, ids_BT: Tensor, texts: list[str], lengths_B: Tensor | None = None) -> list[bool]:
    """For each row, whether its string is tokenised to the very same tokens; ``lengths_B``: to the first of them."""
    return [row == again for row, again in zip(rows_of(ids_BT, lengths_B), to_ids(tokenizer, texts), strict=True)]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token with its spaces; joined, they are the whole text.

    A token that ends inside a character gives an empty string; the token that completes the character gives all of it.
    """
    result, start, said = [], 0, 0  # decode from one token earlier: some tokenizers drop the first token's leading space
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[start:said])
        text = _decode(tokenizer, ids[start:end])
        whole = len(text) > len(before) and (end == len(ids) or not text.endswith("\ufffd"))
        result.append(text[len(before) :] if whole else "")
        if whole:
            start, said = said, end
    return result


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
