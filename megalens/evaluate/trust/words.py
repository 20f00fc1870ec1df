"""What the words of a text have to do with its context: said there, about to be said, inferred, or made up. Word by word, by form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from megalens.evaluate.trust.judged import Statistic, difference, ratio

_FUNCTION_WORDS = """
    about above after again all also although among and another any are around because been before being below between both but can
    could did does during each either ever every few for from further had has have having her here hers him his how however into its just
    least less like made many may might more most much must near neither nor not now off often once one only other our out over own same
    several shall she should since some still such than that the their them then there these they this those though through thus too
    toward two under until upon used very via was well were what when where whether which while who whom whose why will with within
    without would yet you your
"""
STOP = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[^\W\d_]{3,}")


def content_words(text: str) -> frozenset[str]:
    """The distinct content words of a text: lower case, three letters at least, no function words, endings taken off."""
    return frozenset(stem(word) for word in _WORD.findall(text.lower()) if word not in STOP)


def stem(word: str) -> str:
    """A word of over four letters without ``ing``, ``ed``, ``es`` or ``s``."""
    if len(word) > 4:
        for ending in ("ing", "ed", "es", "s"):
            if word.endswith(ending):
                return word[: -len(ending)]
    return word


def said(texts: Sequence[frozenset[str]], targets: Sequence[Iterable[str]]) -> tuple[np.ndarray, np.ndarray]:
    """For each row how many of its target words its text says, and how many there are, ``[N]`` each."""
    wanted = [frozenset(words) for words in targets]
    hits = [len(words & text) for words, text in zip(wanted, texts, strict=True)]
    return np.array(hits, float), np.array([len(words) for words in wanted], float)


def said_lift(texts: Sequence[frozenset[str]], targets: Sequence[Iterable[str]], partner_N: np.ndarray) -> Statistic:
    """Share of target words that a row's text says, minus the share that its partner's text says."""
    own, count = said(texts, targets)
    other, _ = said([texts[i] for i in partner_N], targets)
    return difference(ratio(own, count), ratio(other, count))


def kinds_of_words(
    texts: Sequence[frozenset[str]], contexts: Sequence[frozenset[str]], nexts: Sequence[frozenset[str]]
) -> dict[str, np.ndarray]:
    """For each row how many of its text's words are an ``echo`` of its context, lie ``ahead`` in what comes next, or are ``invented``.

    ``words`` counts them all.

    Args:
        texts: content words of each row's text.
        contexts: those of its context up to P.
        nexts: those of what really follows.
    """
    rows = [
        (len(text & context), len((text & following) - context), len(text - context - following), len(text))
        for text, context, following in zip(texts, contexts, nexts, strict=True)
    ]
    return {
        name: np.array(column, float) for name, column in zip(("echo", "ahead", "invented", "words"), zip(*rows, strict=True), strict=True)
    }


def kind_lift(
    kind: str, texts: Sequence[frozenset[str]], contexts: Sequence[frozenset[str]], nexts: Sequence[frozenset[str]], partner_N: np.ndarray
) -> Statistic:
    """The share of words of one kind, minus what it is beside a partner's context: ``kind`` as in :func:`kinds_of_words`."""
    own = kinds_of_words(texts, contexts, nexts)
    other = kinds_of_words(texts, [contexts[i] for i in partner_N], [nexts[i] for i in partner_N])
    return difference(ratio(own[kind], own["words"]), ratio(other[kind], other["words"]))
