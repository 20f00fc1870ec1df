"""``report.html``, the result of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from megalens.evaluate.baselines import SOURCES
from megalens.evaluate.coloured import coloured, legend, shade, token_page
from megalens.evaluate.evaluation import Result
from megalens.evaluate.metrics import FIGURES, TABLES
from megalens.evaluate.table import (
    COMPARED,
    WORTH,
    about_comparison,
    by_length,
    by_others,
    compared,
    describe,
    interval,
    lengths_told,
    number,
    worth,
)
from megalens.evaluate.trust.suite import with_lines
from megalens.files import new_file
from megalens.page.charts import Interval, Line, intervals, lines, points
from megalens.page.text import escape

CURVES = (
    ("loss", ("train/loss", "val/loss")),
    ("held-out fve_nrm", ("val/fve_nrm",)),
    ("held-out kl_recovered", ("val/kl_recovered",)),
)


def save(run: str | Path, result: Result, curve: list[dict]) -> None:
    """Write ``evaluation.json`` and ``report.html`` into a run's folder. A reader sees the old file or the new one, never half of one.

    Args:
        run: the folder; its name is the report's title.
        curve: lines of the run's ``metrics.jsonl`` (:func:`megalens.training.track.read_curve`).
    """
    _save(Path(run) / "evaluation.json", json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    _save(Path(run) / "report.html", render(result, Path(run).resolve().name, curve))


def render(result: Result, title: str, curve: list[dict]) -> str:
    """The report as a string."""
    s = result.setting
    trained = range(s["min_pos"], s["seq_len"])
    intervals_too = ", with 95 % intervals over documents" if s["bootstrap"] else ""
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="soft">A lens reads an activation out of a language model, says in a few words what is in it, and proves the words by '
        "rebuilding the activation from them alone. Measured here on documents it has never seen.</p>",
        _setting(s),
        "<h2>How much of the activation the words hold</h2>",
        f'<div class="card">{_forest(result)}</div>',
        f'<p class="soft"><code>fve_nrm</code>{intervals_too}. Above the lens: gold and copies; below it: floors. '
        f"A copy is the context&rsquo;s own last {'' if s.get('end') else s['t_text']} tokens in the explanation&rsquo;s place"
        f"{', as many as the text has' if s.get('end') else ''}: it needs no lens, and a lens earns "
        "its name when it beats it.</p>",
        "<h2>Every figure</h2>",
        *(_table(result, names) for names in TABLES),
        *(["<h2>The first tokens alone</h2>", _cells(by_length(result))] if result.prefixes else []),
        f'<p class="soft">{escape(describe(result))} {result.roundtrip:.1%} of the explanations are re-tokenised to the very tokens '
        f"that were said; all are read from their string. {lengths_told(result)}</p>",
        _definitions(),
        "<h2>Searches for words</h2>",
        _comparison(result),
        *(f'<p class="soft">{escape(sentence)}</p>' for sentence in about_comparison(result.comparison)),
    ]
    if result.trust:
        parts += ["<h2>Can the words be trusted?</h2>", _trust(result)]
    if result.examples:
        parts += [
            "<h2>The first held-out rows</h2>",
            '<p class="soft">Not chosen: the first in the order of the data.</p>',
            _examples(result),
        ]
    if result.documents:
        parts += ["<h2>Held-out texts, token by token</h2>", legend(trained)]
        parts += [coloured(document["tokens"], trained) for document in result.documents]
    if drawings := curves(curve):
        cards = "".join(f'<div class="card">{drawing}</div>' for drawing in drawings)
        parts += ["<h2>Training</h2>", f'<div class="plots">{cards}</div>']
    return token_page(f"{title} · megalens", "\n".join(parts))


def curves(logged: list[dict]) -> list[str]:
    """A drawing for each group of :data:`CURVES` of which something was logged twice; ``logged`` as ``curve`` in :func:`save`."""
    drawings = []
    for title, names in CURVES:
        series = [(name, found) for name in names if len(found := points(logged, name)) > 1]
        shown = [Line(name, found, accent=i > 0 or len(series) == 1) for i, (name, found) in enumerate(series)]
        if shown:
            drawings.append(lines(title, shown, width=360, height=210, named=True))
    return drawings


def _save(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text.encode(errors="replace"))


def _setting(s: dict) -> str:
    shown = {
        "subject": s["model"],
        "after block": s["layer_l"],
        "tokens per explanation": f"up to {s['t_text']}" if s.get("end") else s["t_text"],
        "search": s["search"],
        "training": s.get("trained"),
        "trained weights": s["train_mode"],
        "text": s["dataset"],
        "held-out rows": s["rows"],
        "documents": s["documents"],
        "checkpoint": s.get("checkpoint"),
    }
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in shown.items() if value is not None)
    return f'<dl class="setting">{"".join(items)}</dl>'


def _forest(result: Result) -> str:
    rows = []
    for source, figures in _sources(result):
        value = figures["fve_nrm"]
        ends = (figures.get("fve_nrm_low", value), figures.get("fve_nrm_high", value))
        rows.append(Interval(SOURCES[source].label, value, *ends, ours=source == "lens"))
    return intervals("fve_nrm" + (" with 95 % intervals" if result.setting["bootstrap"] else ""), rows)


def _table(result: Result, names: tuple[str, ...]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for source, figures in _sources(result):
        cells = "".join(f"<td>{_cell(figures, name)}</td>" for name in names)
        ours = ' class="ours"' if source == "lens" else ""
        rows.append(f'<tr{ours}><th scope="row">{escape(SOURCES[source].label)}</th>{cells}</tr>')
    return f'<div class="card"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cells(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>' for row in rows[1:]
    )
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _trust(result: Result) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("value", "95 %", "verdict", "what it means"))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in with_lines(result.trust)
    )
    return f'<div class="card"><table class="words"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _comparison(result: Result) -> str:
    tables = []
    for names, cells in (
        (COMPARED, {name: [_cell(each, figure) for figure in COMPARED] for name, each in compared(result).items()}),
        (WORTH, {name: map(escape, worth(each, result.comparison.copies)) for name, each in result.comparison.searches.items()}),
    ):
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in each)}</tr>' for name, each in cells.items()
        )
        tables.append(f'<div class="card"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>')
    return "".join(tables)


def _cell(figures: dict[str, float], name: str) -> str:
    if f"{name}_low" not in figures:
        return interval(figures, name)
    low, high = (number(figures[f"{name}_{end}"]) for end in ("low", "high"))
    return f"{number(figures[name])}<small>[{low}, {high}]</small>"


def _sources(result: Result) -> list[tuple[str, dict[str, float]]]:
    return [(source, result.figures[source]) for source in SOURCES if source in result.figures]


def _definitions() -> str:
    items = "".join(f"<p><code>{figure.name}</code>: {escape(figure.meaning)}</p>" for figure in FIGURES if figure.meaning)
    return f'<details><summary>what the figures mean</summary><div class="soft">{items}</div></details>'


def _examples(result: Result, tail: int = 160) -> str:
    rows = []
    for row, example in enumerate(result.examples):
        context = example["context"]
        shown = "…" + context[-tail:] if len(context) > tail else context
        for label, each in ((shown, example), *by_others(result, row).items()):
            said = escape(each["explanation"]) or "(nothing)"
            fve = f'<span class="t {shade(each["fve"])}"> {each["fve"]:.2f} </span>'
            rows.append(f'<tr><td class="tail">{escape(label)}</td><td class="said">{said}</td><td>{fve}</td></tr>')
    head = "<thead><tr><th>context ends with</th><th>explanation</th><th>FVE</th></tr></thead>"
    return f'<div class="card"><table class="words">{head}<tbody>{"".join(rows)}</tbody></table></div>'
