"""A text coloured by the FVE of each token, its explanations on hover, focus and touch; and the page around such texts."""

from __future__ import annotations

from megalens.page.frame import page
from megalens.page.text import escape

_LEVELS = 10  # shades between 0 and 1, and as many between 0 and -1

STYLE = """
.text { font: 1.06rem/2.05 ui-serif, Georgia, "Times New Roman", serif; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { border-radius: .2rem; padding: .14em 0; cursor: help;
  background: rgb(var(--tone) / calc(var(--weak) + var(--v) * (var(--full) - var(--weak)))); }
.t:hover, .t:focus { outline: 2px solid var(--ink); outline-offset: 1px; }
.t.out { text-decoration: underline dotted var(--soft); text-underline-offset: .3em; }
.g { --tone: var(--good); } .b { --tone: var(--bad); }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem .35rem; font-size: .84rem; color: var(--soft);
  margin: .6rem 0; }
.legend .t { cursor: default; padding: .1rem .45rem; color: var(--ink); } .legend .gap { margin-left: 1rem; }
#tip { position: fixed; z-index: 9; max-width: min(26rem, calc(100vw - 1.5rem)); background: var(--ink); color: var(--bg);
  border-radius: .45rem;
  padding: .5rem .7rem; font-size: .9rem; line-height: 1.4; pointer-events: none; box-shadow: 0 4px 18px rgb(0 0 0 / .3); }
#tip[hidden] { display: none; } #tip b { display: block; font: 600 1rem/1.4 ui-serif, Georgia, serif; overflow-wrap: anywhere; }
#tip span { opacity: .8; }
""" + " ".join(f".v{i} {{ --v: {i / _LEVELS}; }}" for i in range(_LEVELS + 1))

SCRIPT = """
const tip = document.getElementById("tip");
function show(token) {
  const said = document.createElement("b"), note = document.createElement("span");
  said.textContent = token.dataset.said || "(nothing)";
  const where = token.classList.contains("out") ? " · outside the trained positions" : "";
  note.textContent = "position " + token.dataset.at + " · FVE " + token.dataset.fve + where;
  tip.replaceChildren(said, note);
  tip.hidden = false;
  const box = [...token.getClientRects()].at(-1), own = tip.getBoundingClientRect();
  tip.style.left = Math.max(6, Math.min(box.left, innerWidth - own.width - 6)) + "px";
  tip.style.top = (box.bottom + 8 + own.height < innerHeight ? box.bottom + 8 : Math.max(6, box.top - own.height - 8)) + "px";
}
function hide() { tip.hidden = true; }
for (const text of document.querySelectorAll(".text")) {
  const tokens = [...text.querySelectorAll(".t")];
  if (tokens.length) tokens[0].tabIndex = 0;
  text.addEventListener("pointerover", event => { const token = event.target.closest(".t"); if (token) show(token); });
  text.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  text.addEventListener("focusin", event => {
    for (const token of tokens) token.tabIndex = -1;
    event.target.tabIndex = 0;
    show(event.target);
  });
  text.addEventListener("focusout", hide);
  text.addEventListener("keydown", event => {
    const at = tokens.indexOf(event.target);
    const to = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1}[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !tokens[to]) return;
    event.preventDefault();
    tokens[to].focus();
  });
}
addEventListener("scroll", hide, {passive: true});
"""


def token_page(title: str, body: str) -> str:
    """A page whose ``body``, HTML already, may hold :func:`coloured` texts and a :func:`legend`."""
    return page(title, f'{body}\n<div id="tip" role="status" hidden></div>', STYLE, SCRIPT)


def shade(fve: float) -> str:
    """CSS classes of a token's colour: blue from 0 to 1, orange below 0; everything below -1 looks like -1."""
    tone = "g" if fve >= 0 else "b"
    return f"{tone} v{round(min(1.0, abs(fve)) * _LEVELS)}"


def coloured(tokens: list[dict], trained: range) -> str:
    """A text as HTML, each token coloured by its FVE. Its explanation is shown on hover, focus and touch, and in a table below.

    Args:
        tokens: ``token``, ``explanation`` and ``fve`` of each.
        trained: the positions that the lens was trained on; tokens at others are marked.
    """
    spans, rows = [], []
    for at, each in enumerate(tokens):
        said, fve = escape(each["explanation"]), f"{each['fve']:.2f}"
        out = "" if at in trained else " out"
        word = escape(each["token"]).replace("⏎", "⏎\n") or "·"
        spans.append(
            f'<span class="t {shade(each["fve"])}{out}" tabindex="-1" data-at="{at}" data-fve="{fve}" data-said="{said}">{word}</span>'
        )
        rows.append(f'<tr><td>{at}</td><td>{word}</td><td class="said">{said or "(nothing)"}</td><td>{fve}</td></tr>')
    head = "<thead><tr><th>position</th><th>token</th><th>explanation</th><th>FVE</th></tr></thead>"
    table = f'<details><summary>as a table</summary><table class="words">{head}<tbody>{"".join(rows)}</tbody></table></details>'
    text = f'<div class="text" role="group" aria-label="text, token by token: arrow keys move">{"".join(spans)}</div>'
    return f'<div class="card">{text}{table}</div>'


def legend(trained: range) -> str:
    """The key to the colours, as HTML."""
    steps = [-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0]
    swatches = "".join(
        f'<span class="t {shade(v)}">{"&le; &minus;1" if v == -1 else f"{v:g}".replace("-", "&minus;")}</span>' for v in steps
    )
    return (
        f'<div class="legend">FVE of the token: {swatches}<span class="gap"><span class="t g v0 out">dotted</span> '
        f"outside the positions the lens was trained on ({trained.start} to {trained.stop - 1})</span></div>"
        '<p class="soft">Blue: the activation&rsquo;s direction can be rebuilt from the explanation, the stronger the better. '
        "Faint: no better than the training mean. Orange: worse than it. Point at a token, tap it, or use the arrow keys to read its "
        "explanation. The very first positions are attention sinks: their activations are like no others, their figures say little.</p>"
    )
