"""The whole suite: runs its parts, keeps what is done after each, and goes on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megalens.evaluate.table import align, number
from megalens.evaluate.trust import planting  # noqa: F401 (registers its part)
from megalens.evaluate.trust.judged import Judged, judge
from megalens.evaluate.trust.lines import LINES
from megalens.evaluate.trust.parts import PARTS, Known
from megalens.evaluate.trust.rows import TrustRows
from megalens.files import save_json

SHORT = ("identification", "reading", "chance")
"""The parts that every evaluation has."""


def run_parts(
    rows: TrustRows,
    known: Known,
    bootstrap: int,
    names: tuple[str, ...] = tuple(PARTS),
    done: dict[str, dict] | None = None,
    after: Callable[[dict[str, dict]], None] | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """The figures of some parts, ready for JSON: ``{part: {figure: value}}``; a judged one is ``{value, low, high, verdict}``.

    Args:
        done: parts that need not run again.
        after: called with all that is done, after each part.
    """
    found = dict(done or {})
    for name in tqdm([name for name in names if name not in found], desc="trust", unit="part", disable=not progress):
        found[name] = {figure: plain(figure, value, rows, bootstrap) for figure, value in PARTS[name](rows, known).items()}
        if after is not None:
            after(found)
    return {name: found[name] for name in names}


def plain(name: str, value: Any, rows: TrustRows, bootstrap: int) -> Any:
    """A figure as JSON has it."""
    if callable(value):
        line = LINES[name][0] if name in LINES else None
        value = judge(value, rows.doc_id_N, line, bootstrap, rows.lens.config.seed)
    return _without_nan(dataclasses.asdict(value) if isinstance(value, Judged) else value)


def _without_nan(value: Any) -> Any:
    """None in the place of what is not a number: JSON has no word for it."""
    if isinstance(value, dict):
        return {str(key): _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def kept(path: Path, setting: dict[str, Any]) -> dict[str, dict]:
    """The parts that a file holds for the same setting; none where it is another's, or no JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["parts"] if found["setting"] == setting else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def keep(path: Path, setting: dict[str, Any]) -> Callable[[dict[str, dict]], None]:
    """What :func:`run_parts` calls after each part."""
    return lambda parts: save_json(path, {"setting": setting, "parts": parts})


def judgement(parts: dict[str, dict[str, Any]]) -> str:
    """The figures that have a line: each with its interval, verdict and what it means; empty where there are none."""
    shown = with_lines(parts)
    return "\n".join(["Can the words be trusted? (tools/trust.py asks more)", align(shown, "<><<<")]) if shown else ""


def table(parts: dict[str, dict[str, Any]]) -> str:
    """All judged figures, those with a line first, each with its interval, verdict and meaning."""
    judged, lined = _judged(parts), with_lines(parts)
    rest = [[name, *_cells(value), "", ""] for name, value in judged.items() if name not in LINES]
    return align([["", "value", "95 %", "", ""], *lined, *rest], "<><<<")


def with_lines(parts: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Name, value, interval, verdict and meaning of each figure that has a line."""
    judged = _judged(parts)
    return [[name, *_cells(judged[name]), judged[name]["verdict"], LINES[name][1]] for name in LINES if name in judged]


def _judged(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    every = {name: value for figures in parts.values() for name, value in figures.items()}
    return {name: value for name, value in every.items() if isinstance(value, dict) and "verdict" in value}


def _cells(value: dict[str, Any]) -> list[str]:
    shown = ["-" if value[end] is None else number(value[end]) for end in ("value", "low", "high")]
    return [shown[0], f"[{shown[1]}, {shown[2]}]"]
