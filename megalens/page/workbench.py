"""The page on which a text's activations are read, edited and compared."""

from __future__ import annotations

from megalens.page.frame import page
from megalens.page.text import escape


def workbench(title: str) -> str:
    """The page of a lens.

    Args:
        title: which lens it is.
    """
    return page(f"{title} · megalens", f"<h1>{escape(title)}</h1>")
