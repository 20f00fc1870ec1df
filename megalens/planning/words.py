"""A tokenizer for a plan, which needs the lengths of prompts and not a model's files."""

from __future__ import annotations

import re
from typing import Any

from megalens.config import Config, ConfigError
from megalens.families.loading import load_tokenizer


def tokenizer_or_words(config: Config) -> Any:
    """The configuration's tokenizer; where it is missing, one that counts words."""
    try:
        return load_tokenizer(config)
    except ConfigError:
        return _Words()


class _Words:
    """Stands in for a missing tokenizer: one token per word, which is near enough for the few words of a prompt."""

    eos_token_id = 0

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [self._known.setdefault(word, len(self._known)) for word in re.findall(r"\w+|[^\w\s]", text)]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_) -> str:
        return messages[0]["content"]
