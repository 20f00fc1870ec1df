"""The result as plain text: our lens beside every floor and ceiling, and examples."""

from __future__ import annotations

from megalens.evaluate.baselines import SOURCES
from megalens.evaluate.compare import Comparison
from megalens.evaluate.evaluation import Result
from megalens.evaluate.metrics import TABLES
from megalens.page.text import visible

COMPARED = ("fve_nrm", "kl_recovered", "other_reader", "channel")
"""The figures of the first table of a comparison."""
WORTH = ("gain_over_copy", "copied tokens", "perplexity", "texts read", "tokens said")
"""The heads of the second."""


def table(result: Result) -> str:
    """Aligned plain text: one line per source, 95 % intervals in brackets."""
    blocks = []
    for names in TABLES:
        rows = [["", *names]]
        for source, (label, _) in SOURCES.items():
            if source in result.figures:
                rows.append([label, *(interval(result.figures[source], name) for name in names)])
        blocks.append(align(rows))
    ours = result.figures["lens"]
    quantiles = ", ".join(f"{ours[f'cos_q{q}']:.3f}" for q in ("05", "50", "95"))
    notes = [
        describe(result),
        f"The lens: cos at its 5, 50 and 95 % quantiles {quantiles}; {result.roundtrip:.1%} of its texts round-trip token for token.",
    ]
    notes += filter(None, [lengths_told(result)])
    if result.prefixes:
        blocks.append(align(by_length(result)))
    return "\n\n".join([*blocks, "\n".join(notes)])


def lengths_told(result: Result) -> str:
    """In one sentence, how long the explanations are; empty where all have one length."""
    ours = result.figures["lens"]
    if "unfinished" not in ours:
        return ""
    return f"Its explanations have {ours['tokens']:.1f} tokens in the mean; {ours['unfinished']:.1%} of its texts did not end."


def by_length(result: Result) -> list[list[str]]:
    """Cells of the table of what the lens's first tokens hold, and copies of as many: a row for each length, the whole text last."""
    sources = [source for source in SOURCES if source in next(iter(result.prefixes.values()))]
    rows = [["fve_nrm", *(SOURCES[source].label for source in sources)]]
    for count, figures in [*result.prefixes.items(), ("", result.figures)]:
        label = f"first {count} token" + "s" * (count != "1") if count else "whole text"
        rows.append([label, *(interval(figures[source], "fve_nrm") for source in sources)])
    return rows


def comparison(result: Result) -> str:
    """Searches side by side: two tables, and what they are of."""
    made = result.comparison
    rows = compared(result)
    blocks = [align([["", *COMPARED], *([name, *(interval(each, figure) for figure in COMPARED)] for name, each in rows.items())])]
    blocks.append(align([["", *WORTH], *([name, *worth(each, made.copies)] for name, each in made.searches.items())]))
    return "\n\n".join([*blocks, "\n".join(about_comparison(made))])


def compared(result: Result) -> dict[str, dict[str, float]]:
    """The figures of a comparison: of copies, and of each search, by the names they have in tables."""
    return {"copy, same reconstructor": result.comparison.copy, **result.comparison.searches}


def worth(figures: dict[str, float], curve: dict[str, float]) -> list[str]:
    """The cells of :data:`WORTH` for a search."""
    numbers = (f"{figures[name]:.1f}" if name in figures else "-" for name in ("perplexity", "reads", "said"))
    return [interval(figures, "gain_over_copy"), copied(figures, curve), *numbers]


def about_comparison(made: Comparison) -> list[str]:
    """What the figures of a comparison are, in sentences."""
    curve = ", ".join(f"{count}: {value:.3f}" for count, value in made.copies.items())
    return [
        f"Searches on the first {made.rows} of these activations, of {made.documents} documents. Other reader: {made.other_reader}.",
        "Channel: what the other reader keeps of the texts' fve_nrm, relative to what it keeps of the copies'.",
        "Perplexity: the texts' median under the untouched subject. Texts read by the reconstructor, tokens said: for one activation.",
        f"Copied tokens: how many last tokens of the context give the same fve_nrm. Copies of so many tokens give {curve}.",
    ]


def copied(figures: dict[str, float], curve: dict[str, float]) -> str:
    """``3.4``, or on which side of the curve of copies it lies."""
    value = figures["copied_tokens"]
    least, *_, most = curve
    if value == 0:
        return f"below {least}"
    return f"over {most}" if figures["fve_nrm"] > max(curve.values()) else f"{value:.1f}"


def interval(figures: dict[str, float], name: str) -> str:
    """``0.412 [0.398, 0.426]``, or the bare figure where there is no interval."""
    value, low, high = (figures.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{value:.3f}".replace("-0.000", "0.000")


def align(rows: list[list[str]], sides: str = "<>", gap: str = "  ") -> str:
    """Columns padded to their widest cell.

    Args:
        sides: ``<`` (left) or ``>`` (right) for each column; the last is that of all further ones.
        gap: between columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    lines = [[f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows]
    return "\n".join(gap.join(line).rstrip() for line in lines)


def describe(result: Result) -> str:
    """In one sentence, what the figures are of."""
    s = result.setting
    tokens = f"up to {s['t_text']} tokens, each copy as long as its text" if s.get("end") else f"{s['t_text']} tokens"
    brackets = f"; brackets: 95 % interval over documents ({s['bootstrap']} resamples)" if s["bootstrap"] else ""
    return (
        f"{s['rows']} held-out activations of {s['documents']} documents ({s['dataset']}), {s['model']}, layer {s['layer_l']}, "
        f"explanations ({s['search']}) and copies of {tokens}; measured against the statistics of the training "
        f"activations ({s['statistics']}){brackets}."
    )


def examples(result: Result, tail: int = 60) -> str:
    """The first held-out rows: the end of the context, the explanation, the row's FVE; not chosen. Empty where there are none.

    Below each what other searches say of it, by their names.
    """
    if not result.examples:
        return ""
    rows = [["context ends with", "→", "explanation", "   FVE"]]
    for number, example in enumerate(result.examples):
        context = visible(example["context"])
        rows.append(["…" + context[-tail:] if len(context) > tail else context, "→", *_shown(example)])
        rows += [[name, ":", *_shown(other)] for name, other in by_others(result, number).items()]
    return align(rows, "><<>", " ")


def by_others(result: Result, number: int) -> dict[str, dict]:
    """What the searches that the first one is compared with say of a row: ``explanation`` and ``fve`` by their names."""
    _, *others = result.comparison.texts.items() or [("", [])]
    return {name: texts[number] for name, texts in others if number < len(texts)}


def _shown(explained: dict) -> list[str]:
    return [visible(explained["explanation"]).strip(), f"{explained['fve']:6.2f}"]
