"""Every drawing of every page, as inline SVG: intervals, lines, bars, columns and parallel coordinates.

Our own, because a page must stand alone, follow the reader's light or dark mode, and say a mark's value when it is pointed at. matplotlib
draws the same into SVG, but knows neither titles nor colours of a style sheet: both must be put into its text afterwards. Its lines take
twice the bytes, its installation is a hundred megabytes, and parallel coordinates would be drawn by hand all the same.

Colours are variables of :data:`megalens.page.frame.STYLE`. Every attribute and text is escaped in one place, :func:`_tag`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from megalens.page.text import escape

WIDTH = 760  # of a drawing as wide as the page, in its own units; the page scales it
Point = tuple[float, float]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval; ``ours`` stands out."""

    label: str
    value: float
    low: float
    high: float
    ours: bool = False


@dataclass(frozen=True)
class Line:
    """A line through points, ``name`` shown where it is pointed at.

    Args:
        strength: 1 is bold, 0 is not to be seen.
        accent: in the accent colour; else in the soft one.
    """

    name: str
    points: Sequence[Point]
    strength: float = 1.0
    accent: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates: its name, and the labels of places between 0 (below) and 1 (above)."""

    name: str
    ticks: Sequence[tuple[float, str]]


def points(lines: Sequence[dict], y: str, x: str = "step") -> list[Point]:
    """The pairs of two keys, of those lines that hold a finite number under both."""
    pairs = ((line.get(x), line.get(y)) for line in lines)
    return [(float(a), float(b)) for a, b in pairs if _is_number(a) and _is_number(b)]


def intervals(title: str, rows: Sequence[Interval], low: float = -1.0, high: float = 1.0) -> str:
    """A row per value, with its interval; a value beyond ``low`` or ``high`` is an arrow at that end."""
    left, right, step, top = 230, 50, 27, 8
    bottom = top + step * len(rows)

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * (min(max(value, low), high) - low) / (high - low)

    parts = []
    for tick in (low + (high - low) * i / 4 for i in range(5)):
        dash = {} if abs(tick) < 1e-9 else {"stroke_dasharray": "2 4"}
        parts.append(_tag("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, stroke="var(--line)", **dash))
        parts.append(_text(x(tick), bottom + 16, f"{tick:g}", "middle"))
    for i, row in enumerate(rows):
        y, at = top + step * (i + 0.5), x(row.value)
        colour, kind = ("var(--accent)", "ours") if row.ours else ("var(--ink)", "ink")
        parts.append(_text(left - 14, y + 4, row.label, "end", kind))
        parts.append(_tag("line", x1=x(row.low), x2=x(row.high), y1=y, y2=y, stroke=colour, stroke_width=2))
        if low <= row.value <= high:
            parts.append(_tag("circle", cx=at, cy=y, r=5.5 if row.ours else 4, fill=colour))
        else:
            tip, back = (at - 6, 12) if row.value < low else (at + 6, -12)
            parts.append(_tag("path", d=f"M{tip:.1f} {y:.1f}l{back} -5v10z", fill=colour))
        parts.append(_text(WIDTH - right + 10, y + 4, f"{row.value:.2f}", kind=kind))
    return _drawing(title, WIDTH, bottom + 24, parts)


def lines(title: str, series: Sequence[Line], width: int = WIDTH, height: int = 300, named: bool = False) -> str:
    """Lines over the micro-steps of a training, the first of ``series`` on top.

    Args:
        series: with at least one point in all.
        named: write the title above, and beside it the name of each line, where there are several.
    """
    left, right, top, bottom = 60, 14, 34 if named else 12, 30
    steps, values = ([point[i] for line in series for point in line.points] for i in (0, 1))
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    across, up = (last - first) or 1.0, (high - low) or 1e-9

    def x(step: float) -> float:
        return left + (width - left - right) * (step - first) / across

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / up

    parts = [_text(left, 16, title, kind="ink")] if named else []
    for value in (low, (low + high) / 2, high):
        parts.append(_tag("line", x1=left, x2=width - right, y1=y(value), y2=y(value), stroke="var(--line)"))
        parts.append(_text(left - 8, y(value) + 4, _number(value), "end"))
    for place, text, anchor in ((left, f"{first:g}", "start"), ((left + width - right) / 2, "micro-step", "middle")):
        parts.append(_text(place, height - 10, text, anchor))
    parts.append(_text(width - right, height - 10, f"{last:g}", "end"))
    parts += [_polyline(line, [(x(a), y(b)) for a, b in line.points]) for line in reversed(series)]
    if named and len(series) > 1:
        parts += [_text(width - right, 16 + 15 * i, line.name, "end", style=f"fill:{_colour(line)}") for i, line in enumerate(series)]
    return _drawing(f"{title} over the training", width, height, parts)


def parallel(title: str, axes: Sequence[Axis], series: Sequence[Line]) -> str:
    """Parallel coordinates: an upright axis each, and lines across all of them, the first of ``series`` on top.

    Args:
        axes: at least two.
        series: a line's points are (number of the axis, place on it between 0 and 1).
    """
    height, top, bottom, side = 300, 34, 24, 70

    def x(axis: float) -> float:
        return side + (WIDTH - 2 * side) * axis / (len(axes) - 1)

    def y(place: float) -> float:
        return top + (height - top - bottom) * (1 - place)

    parts = [_polyline(line, [(x(a), y(b)) for a, b in line.points], 1 + 2 * line.strength) for line in reversed(series)]
    for i, axis in enumerate(axes):
        parts.append(_tag("line", x1=x(i), x2=x(i), y1=y(1), y2=y(0), stroke="var(--soft)"))
        parts.append(_text(x(i), 18, axis.name, "middle", "ink"))
        parts += [_text(x(i) + 6, y(place) + 4, label, kind="over") for place, label in axis.ticks]
    return _drawing(title, WIDTH, height, parts)


def bars(title: str, shares: Mapping[str, float]) -> str:
    """A lying bar per name, for shares between 0 and 1."""
    step, left = 28, 230
    parts = []
    for i, (name, share) in enumerate(shares.items()):
        y, length = step * i + 6, (WIDTH - left - 70) * share
        parts.append(_text(left - 12, y + 13, name, "end", "ink"))
        parts.append(_tag("rect", x=left, y=y, width=length, height=16, rx=3, fill="var(--accent)"))
        parts.append(_text(left + length + 8, y + 13, f"{share:.2f}"))
    return _drawing(title, WIDTH, step * len(shares) + 8, parts)


def columns(title: str, values: Sequence[float], labels: Sequence[str]) -> str:
    """A standing column per value, from 0 up; its label and value are shown where it, or the space above it, is pointed at.

    Args:
        values: at least one, none below 0.
        labels: one each; the first and the last are written below.
    """
    height, left, right, top, bottom = 190, 60, 14, 12, 26
    most = max(float(max(values)), 1e-30)
    step, room = (WIDTH - left - right) / len(values), height - top - bottom
    parts = []
    for value in (0.0, most / 2, most):
        y = top + room * (1 - value / most)
        parts.append(_tag("line", x1=left, x2=WIDTH - right, y1=y, y2=y, stroke="var(--line)"))
        parts.append(_text(left - 8, y + 4, _number(value), "end"))
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        x, tall = left + i * step, room * float(value) / most
        space = _tag("path", d=f"M{x:.1f} {top}h{step:.2f}v{room}h-{step:.2f}z", fill="transparent")
        column = _tag("rect", x=x + 0.05 * step, y=top + room - tall, width=0.9 * step, height=tall, fill="var(--accent)")
        parts.append(_tag("g", _tag("title", escape(f"{label}: {_number(value, 4)}")) + space + column))
    parts += [_text(left, height - 8, labels[0]), _text(WIDTH - right, height - 8, labels[-1], "end")]
    return _drawing(title, WIDTH, height, parts)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _colour(line: Line) -> str:
    return "var(--accent)" if line.accent else "var(--soft)"


def _polyline(line: Line, places: Sequence[Point], width: float = 1.8) -> str:
    dash = {"stroke_dasharray": "5 4"} if line.dashed else {}
    faint = {"stroke_opacity": f"{line.strength:.2f}"} if line.strength < 1 else {}
    drawn = {"points": " ".join(f"{a:.1f},{b:.1f}" for a, b in places), "fill": "none", "stroke_linejoin": "round"}
    title = _tag("title", escape(line.name))
    return _tag("polyline", title, **drawn, stroke=_colour(line), stroke_width=width, **faint, **dash)


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "", **attributes: str) -> str:
    where = {} if anchor == "start" else {"text_anchor": anchor}
    return _tag("text", escape(text), x=x, y=y, **where, **({"class": kind} if kind else {}), **attributes)


def _drawing(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return _tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", role="img", aria_label=title)


def _tag(name: str, inside: str = "", **attributes: str | float) -> str:
    """An element around what is SVG already; ``stroke_width=2`` is its attribute ``stroke-width``."""
    shown = {
        key.replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0") for key, value in attributes.items()
    }
    start = f"<{name}" + "".join(f' {key}="{escape(value)}"' for key, value in shown.items())
    return f"{start}>{inside}</{name}>" if inside else f"{start}/>"
