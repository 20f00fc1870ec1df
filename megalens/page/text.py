"""Strings from texts, models and files, made safe to show."""

from __future__ import annotations

import html
import math
import unicodedata
from typing import Any

_PICTURES = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def escape(text: str) -> str:
    """A string as HTML text or attribute value; control and direction-changing characters become signs."""
    return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
    """A string that is safe to print on one line of a terminal or page. Line breaks and tabs become arrows, other control characters and
    those that change the direction of writing become replacement characters."""
    return "".join(_PICTURES.get(c, "\ufffd" if _is_control(c) else c) for c in text)


def finite(value: Any) -> Any:
    """A value for JSON that a browser reads: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _is_control(character: str) -> bool:
    joiners = "\u200c\u200d"  # Persian and emoji need them
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in joiners
