"""Show what a sweep has found: a table, the best trial's command, and a page with parallel coordinates, importance and curves."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from megalens.evaluate.table import align
from megalens.files import new_file
from megalens.page.charts import Axis, Line, bars, lines, parallel, points
from megalens.page.frame import page
from megalens.page.text import escape
from megalens.sweep.file import SweepFile
from megalens.sweep.offline import command_of, run_name, trial_config
from megalens.sweep.search import Search, point_of
from megalens.training.track import read_curve

_STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}


def table(search: Search) -> str:
    """The trials as a text table, the best first."""
    keys, metric = search.sweep.searched, search.sweep.metric
    rows = [["trial", *keys, metric, "state"]]
    for trial in ranked(search):
        rows.append([str(trial.number), *(_short(point_of(trial)[key]) for key in keys), _short(_value(trial)), _STATES[trial.state]])
    return align(rows, ">")


def best_command(search: Search) -> str | None:
    """A command that trains with the best trial's settings, as the run <sweep>-best; None when no trial has finished."""
    best = search.best()
    if best is None:
        return None
    command = command_of(search.sweep, point_of(best) | {"run_name": f"{search.sweep.name}-best"})
    return shlex.join("python" if part == sys.executable else part for part in command if part != "/usr/bin/env")


def ranked(search: Search) -> list[FrozenTrial]:
    """The trials, the best finished one first; then those that ended early, run, or failed."""
    sign = -1 if search.sweep.maximize else 1
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL]
    trials = [t for t in search.trials() if "point" in t.user_attrs]

    def place(trial: FrozenTrial) -> tuple[int, float, int]:
        value = _value(trial)
        return order.index(trial.state), math.inf if value is None else sign * value, trial.number

    return sorted(trials, key=place)


def write(search: Search, path: Path) -> None:
    """Write the page."""
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
        parts.append(f"<h2>What matters</h2><div class='card'>{bars('importance of the parameters', importance)}</div>")
        parts.append("<p class='soft'>Share of each parameter in what sets the better half of the trials apart (PED-ANOVA).</p>")
    if drawing := curves(sweep, trials):
        parts.append(f"<h2>{escape(sweep.metric)} over the training</h2><div class='card'>{drawing}</div>")
    parts.append(f"<h2>All trials</h2><div class='card'>{_html_table(sweep, trials)}</div>")
    with new_file(path) as file:
        file.write(page(f"Sweep {sweep.name}", "\n".join(parts)).encode())


def parallel_coordinates(sweep: SweepFile, trials: list[FrozenTrial]) -> str:
    """One axis per searched key and one for the metric; a line per trial that has a value."""
    shown = [(trial, value) for trial in trials if (value := _value(trial)) is not None]
    found = [_axis(sweep, key) for key in sweep.searched] + [_metric_axis(sweep, [value for _, value in shown])]
    series = []
    for rank, (trial, value) in enumerate(shown):
        values = [*point_of(trial).values(), value]
        named = " · ".join(f"{axis.name} {_short(v)}" for (axis, _), v in zip(found, values, strict=True))
        across = [(i, place(v)) for i, ((_, place), v) in enumerate(zip(found, values, strict=True))]
        is_early = trial.state == TrialState.PRUNED
        series.append(Line(f"trial {trial.number}: {named}", across, _strength(rank, len(shown)), dashed=is_early))
    return parallel("parallel coordinates of the trials", [axis for axis, _ in found], series)


def curves(sweep: SweepFile, trials: list[FrozenTrial]) -> str | None:
    """The metric over the training, a line per trial; None when nothing has been logged twice."""
    found = []
    for trial in trials:
        logged = read_curve(trial_config(sweep, trial.number, point_of(trial)).run_dir / "metrics.jsonl")
        if len(pairs := points(logged, sweep.metric)) > 1:
            found.append((run_name(sweep, trial.number), pairs))
    series = [Line(name, pairs, _strength(rank, len(found))) for rank, (name, pairs) in enumerate(found)]
    return lines(f"{sweep.metric} of each trial", series) if series else None


def _strength(rank: int, count: int) -> float:
    """Of a trial's line: 1 for the best, near 0 for the last."""
    return 1 - 0.85 * rank / max(1, count - 1)


def _axis(sweep: SweepFile, key: str) -> tuple[Axis, Callable[[Any], float]]:
    """The axis of a searched key, and the place of a value on it."""
    if key in sweep.choices:
        names = [json.dumps(option) for option in sweep.choices[key]]
        places = [(i + 0.5) / len(names) for i in range(len(names))]
        labels = [_short(option) for option in sweep.choices[key]]
        return Axis(key, list(zip(places, labels, strict=True))), lambda value: places[names.index(json.dumps(value))]
    numbers = sweep.ranges[key]
    scale = math.log if numbers.log else float
    low, high = scale(numbers.low), scale(numbers.high)
    return Axis(key, [(0, _short(numbers.low)), (1, _short(numbers.high))]), lambda value: (scale(value) - low) / (high - low)


def _metric_axis(sweep: SweepFile, values: list[float]) -> tuple[Axis, Callable[[Any], float]]:
    low, high = min(values), max(values)
    ticks = [(0.0, _short(low)), (1.0, _short(high))] if high > low else [(0.0, _short(low))]
    return Axis(sweep.metric, ticks), lambda value: (value - low) / ((high - low) or 1)


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
