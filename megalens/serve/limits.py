"""What a server takes from its clients, and how it refuses the rest. Every limit has an error that names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from megalens.config import ConfigError

VARIABLES = {
    "max_input_chars": "NLA_MAX_INPUT_CHARS",
    "max_positions_per_request": "NLA_MAX_POSITIONS_PER_REQUEST",
    "max_new_tokens": "NLA_MAX_NEW_TOKENS_LIMIT",
    "max_describe_batch": "NLA_MAX_DESCRIBE_BATCH",
    "max_description_chars": "NLA_MAX_DESCRIPTION_CHARS",
    "max_completion_tokens": "NLA_MAX_COMPLETION_TOKENS",
    "max_concurrent_explains": "NLA_MAX_CONCURRENT_EXPLAINS",
    "max_describe_requests": "NLA_MAX_DESCRIBE_REQUESTS",
    "reconstructor_max_concurrent": "NLA_RECONSTRUCTOR_MAX_CONCURRENT",
    "max_requests": "NLA_MAX_REQUESTS",
}
"""The environment variable of each limit; those that other NLA servers have too are named as there."""


class Refused(ValueError):
    """A request that cannot be answered: the status, and what is wrong, in one line."""

    def __init__(self, status: int, detail: str | list[dict]):
        super().__init__(str(detail))
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        max_input_chars: of a text, or of a chat when it is rendered.
        max_positions_per_request: tokens of one text that one request explains.
        max_new_tokens: that a request may ask for; an explanation has at most the lens's ``t_text``.
        max_describe_batch: vectors of one request.
        max_description_chars: of a text that is scored.
        max_completion_tokens: of a continuation; more are cut off without a word.
        max_concurrent_explains: requests for explanations of texts, running or waiting.
        max_describe_requests: the same, of vectors.
        reconstructor_max_concurrent: requests for scores, running or waiting.
        max_requests: of any kind, running or waiting, streams included.
        max_messages: of a chat.
        max_samples: of one activation.
        max_search: the largest number in a search, e.g. of ``best_of:8``.
    """

    max_input_chars: int = 65_536
    max_positions_per_request: int = 512
    max_new_tokens: int = 4096
    max_describe_batch: int = 512
    max_description_chars: int = 8192
    max_completion_tokens: int = 512
    max_concurrent_explains: int = 64
    max_describe_requests: int = 64
    reconstructor_max_concurrent: int = 64
    max_requests: int = 256
    max_messages: int = 128
    max_samples: int = 32
    max_search: int = 64

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """The limits that :data:`VARIABLES` set.

        Raises:
            ConfigError: one is no whole number of 1 or more.
        """
        given = {name: environment[variable] for name, variable in VARIABLES.items() if variable in environment}
        for name, value in given.items():
            if not (value.isascii() and value.isdigit() and int(value) >= 1):
                raise ConfigError(f"the environment's {VARIABLES[name]}={value} must be a whole number of 1 or more")
        return replace(cls(), **{name: int(value) for name, value in given.items()})

    @property
    def reported(self) -> dict[str, int]:
        """What ``GET /`` says of them under ``limits``."""
        return {name: asdict(self)[name] for name in [field.name for field in fields(self)][:6]}

    def body_bytes(self, width: int) -> int:
        """The most bytes that a request's body may have: its longest text, escaped, and its vectors of a width."""
        return 65_536 + 12 * self.max_input_chars + 28 * width * self.max_describe_batch
