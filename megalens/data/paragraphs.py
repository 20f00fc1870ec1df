"""The documents of ``.txt`` files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import zstandard


def text_documents(files: Sequence[Path]) -> Iterator[str]:
    """What stands between blank lines, or, where no file has a blank line between two others, each line.

    A line is blank when it holds nothing but white space; blank lines at the start and the end of a file part nothing.

    Raises:
        UnicodeDecodeError: a file is not UTF-8.
    """
    by_paragraph = any(_is_divided(_lines(path, errors="replace")) for path in files)
    for path in files:
        lines = _lines(path)
        yield from _paragraphs(lines) if by_paragraph else (line for line in lines if line.strip())


def _lines(path: Path, errors: str = "strict") -> Iterator[str]:
    with (zstandard.open if path.suffix == ".zst" else open)(path, "rt", encoding="utf-8-sig", errors=errors) as file:
        for line in file:
            yield line.rstrip("\n")


def _is_divided(lines: Iterable[str]) -> bool:
    """Does a blank line stand between two others?"""
    had_text = had_blank = False
    for line in lines:
        if not line.strip():
            had_blank = had_text
        elif had_blank:
            return True
        else:
            had_text = True
    return False


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)
