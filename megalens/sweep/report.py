"""What a sweep has found: a table, the best trial's command, and a page with parallel coordinates, importance and curves."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from megalens.evaluate.page import escape, page
from megalens.evaluate.table import align
from megalens.files import new_file
from megalens.sweep.file import SweepFile
from megalens.sweep.offline import command_of, run_name, trial_config
from megalens.sweep.search import Search, point_of
from megalens.training.track import read_curve

_STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}


def table(search: Search) -> str:
    """The trials as text, the best first."""
    keys, metric = search.sweep.searched, search.sweep.metric
    rows = [["trial", *keys, metric, "state"]]
    for trial in ranked(search):
        rows.append([str(trial.number), *(_short(point_of(trial)[key]) for key in keys), _short(_value(trial)), _STATES[trial.state]])
    return align(rows, ">")


def best_command(search: Search) -> str | None:
    """The best trial's training as a command to copy, its run called <sweep>-best; None when no trial has finished."""
    best = search.best()
    if best is None:
        return None
    command = command_of(search.sweep, point_of(best) | {"run_name": f"{search.sweep.name}-best"})
    return shlex.join("python" if part == sys.executable else part for part in command if part != "/usr/bin/env")


def ranked(search: Search) -> list[FrozenTrial]:
    """The trials, the finished ones first and the best of them at the top."""
    sign = -1 if search.sweep.maximize else 1
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL]
    trials = [t for t in search.trials() if "point" in t.user_attrs]

    def place(trial: FrozenTrial) -> tuple[int, float, int]:
        value = _value(trial)
        return order.index(trial.state), math.inf if value is None else sign * value, trial.number

    return sorted(trials, key=place)


def write(search: Search, path: Path) -> None:
    """The page; it needs nothing but itself, and every text from a file is escaped."""
    sweep, trials = search.sweep, ranked(search)
    done = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)
    setting = {"method": sweep.method, "metric": f"{'largest' if sweep.maximize else 'smallest'} {sweep.metric}"}
    setting |= {"trials": f"{done} of {search.limit}", "ended early": str(sum(t.state == TrialState.PRUNED for t in trials))}
    parts = [f"<h1>Sweep {escape(sweep.name)}</h1>"]
    parts.append('<dl class="setting">' + "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in setting.items()) + "</dl>")
    if command := best_command(search):
        parts.append(f"<h2>Best</h2><div class='card'><code>{escape(command)}</code></div>")
    if sweep.searched and done > 1:
        parts.append("<h2>Trials, from parameters to metric</h2>")
        parts.append(f"<div class='card'>{parallel_coordinates(sweep, trials)}</div>")
        parts.append("<p class='soft'>A line per trial, the better the bolder; dashed: ended early. Point at one to read it.</p>")
    if importance := search.importance():
        parts.append(f"<h2>What matters</h2><div class='card'>{bars(importance)}</div>")
        parts.append("<p class='soft'>Share of each parameter in what sets the better half of the trials apart (PED-ANOVA).</p>")
    if drawing := curves(sweep, trials):
        parts.append(f"<h2>{escape(sweep.metric)} over the training</h2><div class='card'>{drawing}</div>")
    parts.append(f"<h2>All trials</h2><div class='card'>{_html_table(sweep, trials)}</div>")
    with new_file(path) as file:
        file.write(page(f"Sweep {sweep.name}", "\n".join(parts)).encode())


def parallel_coordinates(sweep: SweepFile, trials: list[FrozenTrial]) -> str:
    """One axis per searched key and one for the metric."""
    width, height, top, bottom, side = 760, 300, 34, 24, 70
    shown = [(trial, value) for trial in trials if (value := _value(trial)) is not None]
    axes = [_axis(sweep, key) for key in sweep.searched] + [_metric_axis(sweep, [value for _, value in shown])]
    x = [side + (width - 2 * side) * i / (len(axes) - 1) for i in range(len(axes))]
    parts = []
    for rank, (trial, value) in reversed(list(enumerate(shown))):
        values = [*point_of(trial).values(), value]
        places = [top + (height - top - bottom) * (1 - place(v)) for (_, _, place), v in zip(axes, values, strict=True)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, places, strict=True))
        dash = ' stroke-dasharray="5 4"' if trial.state == TrialState.PRUNED else ""
        strength = 1 - 0.85 * rank / max(1, len(shown) - 1)
        named = " · ".join(f"{k} {_short(v)}" for k, v in zip([*sweep.searched, sweep.metric], values, strict=True))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="{1 + 2 * strength:.1f}" '
            f'stroke-opacity="{strength:.2f}"{dash}><title>{escape(f"trial {trial.number}: {named}")}</title></polyline>'
        )
    for at, (name, ticks, place) in zip(x, axes, strict=True):
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}" stroke="var(--soft)"/>')
        parts.append(f'<text class="ink" x="{at:.1f}" y="18" text-anchor="middle">{escape(name)}</text>')
        for tick in ticks:
            y = top + (height - top - bottom) * (1 - place(tick))
            parts.append(f'<text x="{at + 6:.1f}" y="{y + 4:.1f}">{escape(_short(tick))}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="parallel coordinates of the trials">{"".join(parts)}</svg>'


def bars(importance: dict[str, float]) -> str:
    """A bar per key."""
    step, left, width = 28, 230, 760
    parts = []
    for i, (key, share) in enumerate(importance.items()):
        y = step * i + 6
        parts.append(f'<text class="ink" x="{left - 12}" y="{y + 13}" text-anchor="end">{escape(key)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{(width - left - 70) * share:.1f}" height="16" rx="3" fill="var(--accent)"/>')
        parts.append(f'<text x="{left + (width - left - 70) * share + 8:.1f}" y="{y + 13}">{share:.2f}</text>')
    height = step * len(importance) + 8
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="importance of the parameters">{"".join(parts)}</svg>'


def curves(sweep: SweepFile, trials: list[FrozenTrial]) -> str | None:
    """The metric over the training, a line per trial; None when nothing has been logged twice."""
    series = []
    for trial in trials:
        lines = read_curve(trial_config(sweep, trial.number, point_of(trial)).run_dir / "metrics.jsonl")
        points = [(line["step"], line[sweep.metric]) for line in lines if sweep.metric in line and math.isfinite(line[sweep.metric])]
        if len(points) > 1:
            series.append((trial, points))
    if not series:
        return None
    width, height, left, bottom, top = 760, 300, 60, 28, 10
    steps, values = ([point[i] for _, points in series for point in points] for i in (0, 1))
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    across, up = (last - first) or 1, (high - low) or 1e-9
    parts = []
    for rank, (trial, points) in reversed(list(enumerate(series))):
        line = " ".join(
            f"{left + (width - left - 10) * (s - first) / across:.1f},{top + (height - top - bottom) * (high - v) / up:.1f}"
            for s, v in points
        )
        strength = 1 - 0.85 * rank / max(1, len(series) - 1)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-opacity="{strength:.2f}" stroke-width="1.8">'
            f"<title>{escape(run_name(sweep, trial.number))}</title></polyline>"
        )
    for value in (low, (low + high) / 2, high):
        y = top + (height - top - bottom) * (high - value) / up
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{left}" y="{height - 8}">{first:g}</text>')
    parts.append(f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">micro-step {last:g}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="the metric of each trial over its training">{"".join(parts)}</svg>'


def _axis(sweep: SweepFile, key: str):
    """(name, ticks, value -> place in [0, 1]) of a searched key."""
    if key in sweep.choices:
        names = [json.dumps(option) for option in sweep.choices[key]]
        return key, sweep.choices[key], lambda value: (names.index(json.dumps(value)) + 0.5) / len(names)
    numbers = sweep.ranges[key]
    scale = math.log if numbers.log else float
    low, high = scale(numbers.low), scale(numbers.high)
    return key, [numbers.low, numbers.high], lambda value: (scale(value) - low) / (high - low)


def _metric_axis(sweep: SweepFile, values: list[float]):
    low, high = min(values), max(values)
    return sweep.metric, [low, high] if high > low else [low], lambda value: (value - low) / ((high - low) or 1)


def _html_table(sweep: SweepFile, trials: list[FrozenTrial]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ["run", *sweep.searched, sweep.metric, "state"])
    rows = []
    for i, trial in enumerate(trials):
        state = _STATES[trial.state] + (f": {trial.user_attrs['error']}" if "error" in trial.user_attrs else "")
        cells = [run_name(sweep, trial.number), *(_short(v) for v in point_of(trial).values()), _short(_value(trial)), state]
        ours = ' class="ours"' if i == 0 and trial.state == TrialState.COMPLETE else ""
        rows.append(f"<tr{ours}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _value(trial: FrozenTrial) -> float | None:
    return trial.user_attrs.get("value")


def _short(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
