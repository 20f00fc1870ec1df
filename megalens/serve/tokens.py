"""A text or a chat as tokens: which bytes of a sign each holds, and which part of which message it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from megalens.serve.limits import Limits, Refused

if TYPE_CHECKING:  # pages that need no server need no pydantic
    from megalens.serve.schema import Message, Shared

GLYPH = 4  # tokens behind a broken one that may complete its sign
BROKEN = "\ufffd"


@dataclass(frozen=True)
class Span:
    """Where a token stands in a chat.

    ``section`` is ``header``, ``content``, ``footer``, or ``scaffold``: what the template says of itself.
    """

    role: str | None = None
    section: str | None = None
    channel: str | None = None
    message_index: int | None = None


NOWHERE = Span()


@dataclass
class Encoded:
    """A text as the subject reads it, and a span for each token."""

    text: str
    ids: list[int]
    spans: list[Span] = field(default_factory=list)


def encode(tokenizer: PreTrainedTokenizerBase, asked: Shared, limits: Limits) -> Encoded:
    """The tokens of a request's text or chat. Names of special tokens in it are special tokens.

    Raises:
        Refused: there is neither, the chat cannot be rendered, or it is too long.
    """
    if not asked.messages:
        if not asked.text:
            raise Refused(400, "Provide either `text` or `messages`.")
        ids = ids_of(tokenizer, asked.text)
        return Encoded(asked.text, ids, [NOWHERE] * len(ids))
    text = _render(tokenizer, asked.messages, asked)
    if len(text) > limits.max_input_chars:
        raise Refused(400, f"The rendered chat has {len(text)} characters, more than {limits.max_input_chars} (max_input_chars).")
    ids = ids_of(tokenizer, text)
    return Encoded(text, ids, _spans(tokenizer, asked, ids))


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids; special tokens are added unless the text already starts with the BOS."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])


def infos(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """A ``TokenInfo`` for each token."""
    ids = encoded.ids if ids is None else ids
    found = zip(ids, glyphs(tokenizer, ids), encoded.spans, strict=True)
    return [
        {"token": token, "token_id": number, "position": at, "fragment_index": index, "fragment_count": count, **asdict(span)}
        for at, (number, (token, index, count), span) in enumerate(found)
    ]


def glyphs(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[str, int, int]]:
    """Each token's text, and which of how many fragments of a sign it is.

    A token that holds some bytes of a sign shows the whole sign, as do the tokens that complete it. Bytes that nothing completes stay a
    replacement character.
    """
    found: list[tuple[str, int, int]] = []
    while len(found) < len(ids):
        at = len(found)
        text = decode(tokenizer, ids[at : at + 1])
        if BROKEN not in text:
            found.append((text, 0, 1))
            continue
        for count in range(2, GLYPH + 2):
            whole = decode(tokenizer, ids[at : at + count])
            if at + count <= len(ids) and BROKEN not in whole:
                found += [(whole, index, count) for index in range(count)]
                break
        else:
            found.append((text, 0, 1))
    return found


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Token ids as they read, special tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], asked: Shared | None = None) -> str:
    """A chat as the template writes it; closed, without a generation prompt, where ``asked`` is None."""
    if not tokenizer.chat_template:
        raise Refused(400, "The subject's tokenizer has no chat template; send `text`.")
    options: dict[str, Any] = {"add_generation_prompt": False}
    if asked is not None:
        options = {
            "add_generation_prompt": asked.add_generation_prompt and not asked.continue_final_message,
            "continue_final_message": asked.continue_final_message,
        }
    if asked is not None and asked.enable_thinking is not None:
        options["enable_thinking"] = asked.enable_thinking
    try:
        turns = [message.model_dump(exclude_none=True) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # noqa: BLE001 (a template is a program that comes with the model and may fail in any way)
        raise Refused(400, f"Failed to apply chat template: {' '.join(str(error).split())[:300]}") from None


def _spans(tokenizer: PreTrainedTokenizerBase, asked: Shared, ids: list[int]) -> list[Span]:
    """The span of each token: a message ends where the chat up to it, closed, parts from the whole."""
    messages, spans, end = asked.messages or [], [NOWHERE] * len(ids), 0
    scaffold = _preamble(tokenizer, messages[0], ids)
    spans[:scaffold] = [Span("system", "scaffold")] * scaffold
    for index, message in enumerate(messages):
        start, upto = end, _closed(tokenizer, messages[: index + 1])
        end = max(start, len(ids) if upto is None else _common(ids, upto))
        own, empty = ids[start:end], _closed(tokenizer, [*messages[:index], message.model_copy(update={"content": ""})])
        header = footer = 0
        if empty is not None:
            bare = empty[start:]
            header = min(_common(own, bare), len(own))
            footer = min(_common(own[::-1], bare[::-1]), len(own) - header)
        for at in range(max(start, scaffold if index == 0 else 0), end):
            section = "header" if at - start < header else "footer" if end - at <= footer else "content"
            spans[at] = Span(message.role, section, message.channel, index)
    spans[end:] = [Span("assistant", "header")] * (len(ids) - end)
    return spans


def _preamble(tokenizer: PreTrainedTokenizerBase, first: Message, ids: list[int]) -> int:
    """How many tokens a template puts before the first message that it does not put before a later one, e.g. a default system's."""
    once, twice = (_closed(tokenizer, [first] * count) for count in (1, 2))
    if once is None or twice is None or twice[: len(once)] != once:
        return 0
    later = len(twice) - len(once)
    alone = len(once) - later
    return alone if 0 < alone <= _common(ids, once) else 0


def _closed(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int] | None:
    """Messages rendered closed, as ids; None where the template refuses them."""
    try:
        return ids_of(tokenizer, _render(tokenizer, messages))
    except Refused:
        return None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
