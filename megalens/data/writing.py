"""Have texts written for the rows of a dump: which prompts there are, what they will cost, the answers so far, the file at the end.

Every answer is put into a cache on the disk as soon as it is there, under a hash of its writer and prompt. So nothing is asked twice: not
after a kill, not for rows whose prompts are equal, not for another file of the same rows. The file itself appears whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megalens.data import DataError
from megalens.data.shards import ShardReader
from megalens.data.writers import Writer
from megalens.files import Lock, new_file

PLACES = ("{context}", "{token}")
_CHUNK = 256


class Wanted(NamedTuple):
    """A text that is wanted: of which row, by which prompt, and the prompt filled in."""

    sample_id: int
    doc_id: int
    position: int
    number: int
    prompt: str


@dataclass
class Plan:
    """What is left to do.

    Attributes:
        texts: wanted in all.
        rows: for how many rows.
        cached: of the texts, those that are written already.
        requests: those that will be asked for; the others share a prompt with one of them.
        prompt_tokens: of the requests.
    """

    texts: int = 0
    rows: int = 0
    cached: int = 0
    requests: int = 0
    prompt_tokens: int = 0

    def told(self, tokens: int, price_in: float | None, price_out: float | None) -> str:
        """In one line, with what it costs where prices (per million tokens) are known."""
        shared = self.texts - self.cached - self.requests
        most = self.requests * tokens
        line = f"{self.texts:,} texts for {self.rows:,} rows: {self.cached:,} written already, {shared:,} share a prompt; "
        line += f"{self.requests:,} requests, about {self.prompt_tokens:,} tokens of prompts and at most {most:,} of texts"
        if price_in is not None or price_out is not None:
            line += f", at most {(self.prompt_tokens * (price_in or 0) + most * (price_out or 0)) / 1e6:,.2f} at the given prices"
        return line


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, parted by lines of ``---``.

    Raises:
        DataError: the file is not there, or a prompt does not hold ``{context}`` or ``{token}``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={path} cannot be read: {error}") from None
    prompts = [prompt.strip() for prompt in re.split(r"^---\s*$", text, flags=re.MULTILINE)]
    for number, prompt in enumerate(prompts, 1):
        if not any(place in prompt for place in PLACES):
            raise DataError(f"prompts={path}: prompt {number} holds neither {' nor '.join(PLACES)}, so it would be the same for every row")
    return prompts


def wanted_texts(reader: ShardReader, tokenizer: PreTrainedTokenizerBase, prompts: list[str], rows: int) -> Iterator[Wanted]:
    """A text for each of the first rows of a dump and each prompt, in order; one record batch in memory at a time."""
    done = 0
    for index in range(len(reader.batch_rows)):
        if done >= rows:
            return
        batch = reader.read_batch(index)
        numbers = zip(*(batch[name].tolist() for name in ("sample_id", "doc_id", "position", "input_ids")), strict=True)
        for sample_id, doc_id, position, ids in islice(numbers, rows - done):
            fill = {"{context}": _decode(tokenizer, ids[: position + 1]), "{token}": _decode(tokenizer, ids[position : position + 1])}
            for number, prompt in enumerate(prompts):
                yield Wanted(sample_id, doc_id, position, number, _filled(prompt, fill))
            done += 1


def _filled(prompt: str, fill: dict[str, str]) -> str:
    """A prompt with its places filled; what is filled in is not looked at again."""
    return re.sub("|".join(map(re.escape, PLACES)), lambda found: fill[found.group()], prompt)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Cache:
    """Answers on the disk, a line of JSON each, found by their key; memory holds a key and a place of each.

    Args:
        path: the file; what is no whole line at its end, left by a kill, is cut off.

    Raises:
        DataError: a whole line is none of ours.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._place: dict[bytes, int] = {}
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                self._place[bytes.fromhex(json.loads(line)["key"])] = whole
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path} is damaged at byte {whole}; remove it, and its answers are asked for again") from None
            whole += len(line)
        self._file.truncate(whole)
        self._end = whole

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def __getitem__(self, key: bytes) -> str:
        self._file.seek(self._place[key])
        return json.loads(self._file.readline())["text"]

    def put(self, key: bytes, text: str) -> None:
        """Keep an answer; it is in the operating system's hands then, and survives a kill of the process."""
        line = json.dumps({"key": key.hex(), "text": text}).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._place[key], self._end = self._end, self._end + len(line)

    def close(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


class Writing:
    """Texts for the rows of a dump by one writer.

    Args:
        reader: the dump's.
        tokenizer: the subject's, which says what a row's context is.
        prompts: of :func:`read_prompts`; a row gets a text for each.
        rows: how many rows of the dump, from its first (it is shuffled).
        writer: who writes.
        folder: where the cache lies.
    """

    def __init__(
        self, reader: ShardReader, tokenizer: PreTrainedTokenizerBase, prompts: list[str], rows: int, writer: Writer, folder: Path
    ):
        self.reader, self.tokenizer, self.prompts, self.rows, self.writer = reader, tokenizer, prompts, rows, writer
        self._path = folder / f"{hashlib.sha256(writer.identity.encode()).hexdigest()[:16]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def plan(self) -> Plan:
        """What is left to do; asks nobody."""
        plan = Plan()
        new: set[bytes] = set()
        with self._cache() as cache:
            for chunk in _chunks(self._wanted(), _CHUNK):
                fresh = {key: wanted.prompt for wanted in chunk if (key := self._key(wanted)) not in cache and key not in new}
                new |= fresh.keys()
                plan.texts += len(chunk)
                plan.rows += sum(wanted.number == 0 for wanted in chunk)
                plan.cached += sum(self._key(wanted) in cache for wanted in chunk)
                plan.prompt_tokens += self.writer.count(list(fresh.values())) if fresh else 0
        plan.requests = len(new)
        return plan

    def run(self, out: Path, requests: int, tag: str | None = None, progress: bool = True) -> tuple[int, int]:
        """Ask for what is missing, then write the file.

        Args:
            out: the .jsonl file; one that is there is replaced when the new one is whole.
            requests: for the bar.
            tag: a text is what stands between these tags of an answer.

        Returns:
            how many texts the file holds, and how many answers were empty or had no such tags.

        Raises:
            DataError: another process writes with this writer now, or the writer fails; what it wrote so far is kept.
        """
        with self._cache() as cache:
            with tqdm(total=requests, desc="write", unit=" texts", disable=not progress) as bar:
                for chunk in _chunks(self._missing(cache), self.writer.chunk):
                    for number, text in self.writer.write([wanted.prompt for _, wanted in chunk]):
                        cache.put(chunk[number][0], text)
                        bar.update()
            return self._save(cache, out, tag)

    @contextmanager
    def _cache(self) -> Iterator[Cache]:
        """The cache, which is ours alone while entered."""
        lock = Lock(self._path.with_suffix(".lock"))
        if not lock.acquire(wait=False):
            raise DataError(f"another process is writing to {self._path}; wait for it to end")
        try:
            cache = Cache(self._path)
            try:
                yield cache
            finally:
                cache.close()
        finally:
            lock.release()

    def _save(self, cache: Cache, out: Path, tag: str | None) -> tuple[int, int]:
        kept = failed = 0
        between = re.compile(f"<{tag}>(.*?)</{tag}>", re.DOTALL) if tag else None
        with new_file(out) as file:
            for wanted in self._wanted():
                answer = cache[self._key(wanted)]
                if between is not None:
                    found = between.search(answer)
                    answer = found.group(1) if found else ""
                if not (text := answer.strip()):
                    failed += 1
                    continue
                row = {"sample_id": wanted.sample_id, "doc_id": wanted.doc_id, "position": wanted.position}
                file.write(json.dumps({**row, "prompt": wanted.number, "text": text}, ensure_ascii=False).encode(errors="replace") + b"\n")
                kept += 1
        return kept, failed

    def _missing(self, cache: Cache) -> Iterator[tuple[bytes, Wanted]]:
        asked: set[bytes] = set()
        for wanted in self._wanted():
            key = self._key(wanted)
            if key not in cache and key not in asked:
                asked.add(key)
                yield key, wanted

    def _wanted(self) -> Iterator[Wanted]:
        return wanted_texts(self.reader, self.tokenizer, self.prompts, self.rows)

    def _key(self, wanted: Wanted) -> bytes:
        return hashlib.sha256(wanted.prompt.encode(errors="replace")).digest()[:16]


def _chunks(items: Iterator, size: int) -> Iterator[list]:
    while chunk := list(islice(items, size)):
        yield chunk
