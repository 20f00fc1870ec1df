"""The page on which a text's activations are read, edited and compared: on a server, or by itself with what was found before."""

from __future__ import annotations

import json
from pathlib import Path

from megalens.page.frame import page
from megalens.page.text import escape, finite

_HERE = Path(__file__).parent


def workbench(title: str, results: list[dict] | None = None) -> str:
    """The page of a lens.

    Args:
        title: which lens it is.
        results: explanations of a text's tokens, as ``/explain`` answers them; the page then needs no server. None: the page asks the
            server that it comes from, and nobody else.
    """
    body, style, script = ((_HERE / f"workbench.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    data = ""
    if results is not None:
        text = json.dumps(finite({"results": results}), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
        data = f'<script type="application/json" id="data">{text}</script>\n'
    return page(f"{title} · megalens", f"<h1>{escape(title)}</h1>\n{body}{data}", style, script, asks=results is None)
