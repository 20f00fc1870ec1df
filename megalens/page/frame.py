"""A whole HTML page that needs nothing but itself, in light and dark.

The page's policy lets no network in but, where a page asks for it, its own server, and no script run but the one it was made with.
"""

from __future__ import annotations

import base64
import hashlib

from megalens.page.text import escape

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --card: #fff; --ink: #1d2026; --soft: #5c6370; --line: #dedbd5; --accent: #0b5c92;
  --good: 0 114 178; --bad: 213 94 0; --weak: .07; --full: .5; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1c1f25; --ink: #e7e6e3; --soft: #a2a8b3; --line: #343943;
  --accent: #7cc0ee; --good: 45 146 217; --bad: 226 112 32; --weak: .09; --full: .62; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.15rem; margin: .8rem 0;
  overflow-x: auto; }
dl.setting { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0 0; }
dl.setting dt { color: var(--soft); font-size: .78rem; } dl.setting dd { margin: 0; font-weight: 550; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem .32rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: baseline;
  white-space: nowrap; }
tr:last-child > * { border-bottom: 0; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; } .words td:last-child, .words th:last-child { text-align: right;
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 550; }
tbody th { font-weight: 450; } tr.ours > * { font-weight: 700; color: var(--accent); }
td small { color: var(--soft); font-weight: 400; font-size: .78rem; margin-left: .3rem; }
.tail { color: var(--soft); font-family: ui-serif, Georgia, serif; }
.words .said { min-width: 15rem; } .said { font-family: ui-serif, Georgia, serif; font-size: 1rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .8rem; } .plots .card { margin: 0; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .ink { fill: var(--ink); }
svg .over { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .84rem/1.5 ui-monospace, monospace; }
svg .ours { fill: var(--accent); font-weight: 700; }
summary { cursor: pointer; color: var(--soft); font-size: .86rem; margin-top: .6rem; }
a { color: var(--accent); } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media print { .card { break-inside: avoid; } details { display: none; } }
"""


def page(title: str, body: str, style: str = "", script: str = "", asks: bool = False) -> str:
    """A page around ``body``, which is HTML already; so are ``style`` (after the common one) and ``script`` CSS and JavaScript.

    Args:
        asks: its script may ask the server that the page comes from.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts, source = (f"<script>{script}</script>\n", f"'sha256-{digest}'") if script else ("", "'none'")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {source}; base-uri 'none'; form-action 'none'"
    policy += "; connect-src 'self'" if asks else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"{scripts}</body>\n</html>\n"
    )
