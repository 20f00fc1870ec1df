"""Who writes texts: a causal LM of a local folder, or an endpoint that speaks the chat completions of OpenAI."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from threading import Event
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from megalens.config import Config, ConfigError
from megalens.data import DataError
from megalens.device import resolve_device
from megalens.families.loading import check_model, load_model, load_tokenizer, subject_fingerprint

_TRIES = 6
_WAIT_AGAIN = (408, 409, 429, 500, 502, 503, 504)


class Sampling(NamedTuple):
    """How a text is written: the most tokens, the temperature (0: the most likely tokens), the seed."""

    tokens: int
    temperature: float
    seed: int


class Writer(Protocol):
    """Answers prompts. ``identity`` names all that an answer depends on beside the prompt."""

    identity: str
    chunk: int  # prompts that it wants to be given at once

    def count(self, prompts: list[str]) -> int:
        """Tokens of some prompts; an endpoint's are counted with the subject's tokenizer, an estimate."""
        ...

    def check(self) -> None:
        """Refuse what cannot work before the first request."""
        ...

    def write(self, prompts: list[str]) -> Iterator[tuple[int, str]]:
        """The answers, each with its prompt's number, in whatever order they come."""
        ...


class LocalWriter:
    """A causal LM of a local folder, or of the hub's cache; a chat template is used where its tokenizer has one.

    Args:
        config: where and how to compute, and whether the model may bring code.
        folder: the model; None: the subject itself.
        at_once: prompts of a batch.
    """

    def __init__(self, config: Config, folder: str | None, sampling: Sampling, at_once: int):
        dumper = dataclasses.replace(config.activation_dumper, layers=[])  # blocks of the subject, which another model may not have
        name, tokenizer_name = folder or config.model_name, None if folder else config.tokenizer_name
        self._config = dataclasses.replace(config, activation_dumper=dumper, model_name=name, tokenizer_name=tokenizer_name, layer_l=0)
        self._settings, self._tokenizer = check_model(self._config), load_tokenizer(self._config)
        self._sampling, self.chunk = sampling, at_once
        self._model: Any = None
        self._chat = bool(getattr(self._tokenizer, "chat_template", None))
        self.identity = json.dumps(
            ["local", subject_fingerprint(self._config), self._tokenizer.chat_template if self._chat else None, sampling]
        )

    def count(self, prompts: list[str]) -> int:
        """Tokens of some prompts, the chat template's among them."""
        return sum(map(len, self._encode(prompts)))

    def check(self) -> None:
        """Nothing: the model is loaded when it first writes."""

    def write(self, prompts: list[str]) -> Iterator[tuple[int, str]]:
        """The answers, in the prompts' order."""
        rows = self._encode(prompts)
        longest, window = max(map(len, rows)), getattr(self._settings.get_text_config(), "max_position_embeddings", None)
        if window is not None and longest + self._sampling.tokens > window:
            raise ConfigError(
                f"a prompt of {longest} tokens and tokens={self._sampling.tokens} do not fit the window of {self._config.model_name} "
                f"({window}); shorten the prompt, lower tokens or name another writer"
            )
        if self._model is None:
            model: Any = load_model(self._config, self._settings)
            self._model = model.to(resolve_device(self._config.device)).eval()
        yield from enumerate(self._generate(rows, longest))

    @torch.inference_mode()
    def _generate(self, rows: list[list[int]], longest: int) -> list[str]:
        pad = next(n for n in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0) if isinstance(n, int))
        ids_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self._model.device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._model.device)
        draws: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self._sampling.temperature:
            draws |= {"do_sample": True, "temperature": self._sampling.temperature, "top_k": 0, "top_p": 1.0}
            torch.manual_seed(int(hashlib.sha256(json.dumps([self._sampling.seed, rows]).encode()).hexdigest()[:15], 16))
        said_BT = self._model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=self._sampling.tokens, pad_token_id=pad, **draws)
        return self._tokenizer.batch_decode(said_BT[:, longest:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if not self._chat:
            return self._tokenizer(prompts)["input_ids"]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rendered = self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]


class Endpoint:
    """An endpoint that the user named, asked for one completion a prompt. It may cost money and sees the prompts.

    The key comes from an environment variable; it is sent to this endpoint alone (redirects are not followed) and never shown.

    Args:
        url: the base, e.g. ``http://127.0.0.1:8000/v1``.
        model: the model's name there.
        key_name: the environment variable; where it is not set, no key is sent.
        at_once: requests under way at once.
        tokenizer: counts tokens ahead.
    """

    def __init__(self, url: str, model: str, key_name: str, sampling: Sampling, at_once: int, tokenizer: PreTrainedTokenizerBase):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ConfigError(
                "writer= must be subject, a model's folder, or a URL like http://127.0.0.1:8000/v1 without a name or key in it"
            )
        self.url, self.model, self._at_once, self.chunk = f"{url.rstrip('/')}/chat/completions", model, at_once, 8 * at_once
        self._key, self._key_name, self._sampling, self._tokenizer = os.environ.get(key_name, ""), key_name, sampling, tokenizer
        self._local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._plain = parts.scheme == "http"
        self._opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if self._local else []))
        self.identity = json.dumps(["endpoint", self.url, model, sampling])

    def count(self, prompts: list[str]) -> int:
        """Tokens of some prompts by the subject's tokenizer."""
        return sum(map(len, self._tokenizer(prompts, add_special_tokens=False)["input_ids"]))

    def check(self) -> None:
        """Refuse to send a key where everybody on the way can read it."""
        if self._key and self._plain and not self._local:
            raise ConfigError(f"writer= is http: the key of {self._key_name} would be sent in the clear; use https, or unset the variable")

    def write(self, prompts: list[str]) -> Iterator[tuple[int, str]]:
        """The answers as they come. When one fails, those under way are waited for: they may have been paid for."""
        stop = Event()  # one request refused is enough: none is begun behind it
        with ThreadPoolExecutor(self._at_once) as pool:
            numbers = {pool.submit(self._ask, prompt, stop): number for number, prompt in enumerate(prompts)}
            left = dict(numbers)
            try:
                for done in as_completed(numbers):
                    del left[done]
                    if (text := done.result()) is not None:
                        yield numbers[done], text
            except DataError:
                for future, number in left.items():
                    if not future.cancel():
                        with suppress(DataError):
                            if (text := future.result()) is not None:
                                yield number, text
                raise
            finally:
                for future in left:
                    future.cancel()

    def _ask(self, prompt: str, stop: Event) -> str | None:
        try:
            return None if stop.is_set() else self._completion(prompt)
        except DataError:
            stop.set()
            raise

    def _completion(self, prompt: str) -> str:
        asked = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self._sampling.tokens}
        body = json.dumps({**asked, "temperature": self._sampling.temperature, "seed": self._sampling.seed}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        for number in range(1, _TRIES + 1):
            request = urllib.request.Request(self.url, body, headers)
            try:
                with self._opener.open(request, timeout=600) as answer:
                    return _content(json.loads(answer.read()))
            except urllib.error.HTTPError as error:
                reason, wait = f"{error.code} {self._shown(error.read(2000))}", error.headers.get("Retry-After", "")
                if error.code not in _WAIT_AGAIN or number == _TRIES:
                    raise DataError(f"{self.url} answers {reason}; what was written so far is kept") from None
                time.sleep(min(60.0, float(wait)) if wait.isdigit() else 0.5 * 2**number)
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                if number == _TRIES or isinstance(error, KeyError | IndexError | TypeError):
                    raise DataError(f"{self.url} gives no completion ({self._shown(error)}); what was written so far is kept") from None
                time.sleep(0.5 * 2**number)
        raise AssertionError("every try returns or raises")

    def _shown(self, what: Any) -> str:
        """A server's words on one line, without the key."""
        text = what.decode(errors="replace") if isinstance(what, bytes) else str(what)
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:300]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_options: Any) -> None:
        """A redirect could carry the key to another host."""
        return None


def _content(answer: dict) -> str:
    return str(answer["choices"][0]["message"]["content"] or "")
