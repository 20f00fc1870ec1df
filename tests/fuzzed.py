"""What the property tests share: values that people and other programs write, how an action may end, and folders before and after.

In the test suite every run tries the same few inputs. ``python tests/fuzz.py MINUTES`` tries new ones, ``FUZZ_TIMES`` as many a round.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from megalens.cli import told

TIMES = int(os.environ.get("FUZZ_TIMES", "0"))
_LONGEST = 120  # seconds that an action may take on a busy machine: beyond, it hangs
_MOST_MEMORY = 2 << 30  # bytes that it may take beyond what there is
_LONGEST_LINE = 1000

WORDS = ["", " ", "no", "off", "yes", "null", "~", "None", "true", "False", "auto", "latest", "a", "text", "val/loss", "é", "\u2028", "\t"]
WORDS += ["nan", ".nan", "inf", "-inf", ".inf", "1e-5", "1e6", "1e400", "-0", "0", "1", "-1", "007", "0x1F", "1_000", "1:30", "2026-01-01"]
WORDS += ["500s", "2e", "100os", "1e6s", "0.5s", "-1s", "9" * 400, "9" * 5000, "x" * 300, "é" * 120, "../..", "/", ".", "a/b", "*", "[1]"]
WORDS += ["${seed}", "${oc.env:NOPE_X}", "${oc.env:HOME}", "${x", "\\${seed}", "${oc.decode:1}", "???", "{}", "[]", "[", "{a: b}", "a: b"]
WORDS += ["- a", "&a [*a]", "!!python/object:os.system", "<<", "#", "'", '"', "\\", "\0", "\ud800", "\ufeff", "<script>", "%s", "{0}"]
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-5, 1e-320, 1e30, 1e300, float("nan"), float("inf")]
words = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats(), words)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)), max_leaves=6
)


def fuzzed(examples: int) -> settings:
    """How many inputs a test tries: in the suite always the same ones, in a long run new ones."""
    return settings(
        max_examples=examples * max(1, TIMES),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),  # large files shrink for minutes
        suppress_health_check=list(HealthCheck),
    )


class Hangs(BaseException):  # no handler of errors may take it for one
    """An action took so long that it would not have ended."""


def outcome(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action gives, and None; or None, and what it says when it refuses.

    Raises:
        Hangs: it takes two minutes.
        AssertionError: what it says is no line or too long a one. Any error that is not ours goes through.
    """
    try:
        with _limited(), _unheard():
            return action(), None
    except Exception as error:
        lines = told(error)
        if not lines:
            raise
        for line in lines:
            assert line.strip(), repr(error)
            assert len(line.splitlines()) == 1, line
            assert len(line) < _LONGEST_LINE, line
        return None, "\n".join(lines)


def tree(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Everything in a folder, by path: links with where they lead, files with a hash of what they hold.

    Args:
        but: names at the top that do not count.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.partition("/")[0] in but:
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


@st.composite
def mutated(draw, value: Any, often: int = 3) -> Any:
    """A JSON value with up to ``often`` of its parts changed, taken out, doubled or put in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, often))):
        places = list(_places(value))
        holder, key = draw(st.sampled_from(places)) if places else (None, None)
        kind = draw(st.sampled_from(["set", "set", "near", "remove", "add"]))
        if holder is None:
            return draw(values)
        if kind == "set":
            holder[key] = draw(values)
        elif kind == "near":
            holder[key] = draw(near(holder[key]))
        elif kind == "remove":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(words)] = draw(values)
        else:
            holder.insert(key, draw(values))
    return value


def near(value: Any) -> st.SearchStrategy:
    """Values that look like this one: the same in quotes, of another sign or size, another kind of nothing."""
    if isinstance(value, bool):
        return st.sampled_from([not value, str(value).lower(), int(value), None])
    if isinstance(value, int | float):
        return st.sampled_from([str(value), -value, value + 1, value - 1, value * 1000, value / 2, float(value), None, [value]])
    if isinstance(value, str):
        return st.sampled_from([value.upper(), f" {value}", value + "x", value[:-1], "", [value], None, f"{value}\n{value}"])
    return st.sampled_from([None, [], {}, str(value), [value], 0])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes with some changed, cut off, doubled or put in."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "cut", "insert", "zero", "double", "empty"]))
    place = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "flip" and data:
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    length = draw(st.integers(1, 64))
    return {
        "cut": data[:place],
        "insert": data[:place] + draw(st.binary(min_size=1, max_size=16)) + data[place:],
        "zero": data[:place] + bytes(length) + data[place + length :],
        "double": data + data,
    }.get(kind, b"")


def as_json(value: Any) -> bytes:
    """A value as a JSON file holds it (NaN and lone surrogates too, as Python writes them)."""
    return json.dumps(value, indent=1).encode()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Time and memory for one action: what asks for more than there is must fail, and take nothing else down."""

    def stop(*_):
        raise Hangs(f"more than {_LONGEST} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MOST_MEMORY, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
