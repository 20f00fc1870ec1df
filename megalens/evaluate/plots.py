"""Two inline SVG drawings: figures with their intervals, and curves over the training."""

from __future__ import annotations

import math
from typing import TypeGuard

from megalens.evaluate.page import escape

CURVES = (
    ("loss", ("train/loss", "val/loss")),
    ("held-out fve_nrm", ("val/fve_nrm",)),
    ("held-out kl_recovered", ("val/kl_recovered",)),
)
_STROKES = ("var(--soft)", "var(--accent)")


def intervals(rows: list[tuple[str, float, float, float, bool]], low: float = -1.0, high: float = 1.0) -> str:
    """Points with whiskers on one axis.

    Args:
        rows: label, value, lower and upper end, and whether it is ours.
        low, high: ends of the axis; what lies beyond is drawn at the end, as an arrow.
    """
    width, left, right, step, top = 760, 230, 50, 27, 8
    span = width - left - right

    def x(value: float) -> float:
        return left + span * (min(max(value, low), high) - low) / (high - low)

    bottom = top + step * len(rows)
    parts = []
    for tick in (low + (high - low) * i / 4 for i in range(5)):
        dash = "" if abs(tick) < 1e-9 else ' stroke-dasharray="2 4"'
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}" stroke="var(--line)"{dash}/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for i, (label, value, start, end, ours) in enumerate(rows):
        y = top + step * (i + 0.5)
        colour, kind = ("var(--accent)", "ours") if ours else ("var(--ink)", "ink")
        parts.append(f'<text class="{kind}" x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line x1="{x(start):.1f}" x2="{x(end):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        if low <= value <= high:
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="{5.5 if ours else 4}" fill="{colour}"/>')
        else:
            tip, back = (x(value) - 6, 12) if value < low else (x(value) + 6, -12)
            parts.append(f'<path d="M{tip:.1f} {y}l{back} -5v10z" fill="{colour}"/>')
        parts.append(f'<text class="{kind}" x="{width - right + 10}" y="{y + 4}">{value:.2f}</text>')
    return f'<svg viewBox="0 0 {width} {bottom + 24}" role="img" aria-label="figures with 95 % intervals">{"".join(parts)}</svg>'


def curves(lines: list[dict]) -> list[str]:
    """One drawing per group of :data:`CURVES` that has at least two points."""
    drawings = []
    for title, names in CURVES:
        series = [(name, _points(lines, name)) for name in names]
        series = [(name, points) for name, points in series if len(points) > 1]
        if series:
            drawings.append(_curve(title, series))
    return drawings


def _points(lines: list[dict], name: str) -> list[tuple[float, float]]:
    pairs = ((line["step"], line.get(name)) for line in lines)
    return [(float(s), float(v)) for s, v in pairs if _is_number(s) and _is_number(v)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve(title: str, series: list[tuple[str, list[tuple[float, float]]]]) -> str:
    width, height, left, right, top, bottom = 360, 210, 52, 14, 34, 30
    steps = [s for _, points in series for s, _ in points]
    values = [v for _, points in series for _, v in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    last, high = (last if last > first else first + 1), (high if high > low else low + 1e-6)

    def place(step: float, value: float) -> str:
        x = left + (width - left - right) * (step - first) / (last - first)
        return f"{x:.1f},{top + (height - top - bottom) * (high - value) / (high - low):.1f}"

    parts = [f'<text class="ink" x="{left}" y="16">{escape(title)}</text>']
    for value in (low, (low + high) / 2, high):
        x, y = place(first, value).split(",")
        parts.append(f'<line x1="{x}" x2="{width - right}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{place(step, low).split(",")[0]}" y="{height - 10}" text-anchor="{anchor}">{step:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">micro-step</text>')
    for i, (name, points) in enumerate(series):
        stroke = _STROKES[i] if len(series) > 1 else _STROKES[1]
        line = " ".join(place(*point) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{stroke}" stroke-width="1.8" stroke-linejoin="round"/>')
        if len(series) > 1:
            parts.append(f'<text x="{width - right}" y="{16 + 15 * i}" text-anchor="end" style="fill:{stroke}">{escape(name)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} over the training">{"".join(parts)}</svg>'
