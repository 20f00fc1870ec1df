"""Sweep files as W&B reads them, checked against our own settings before a trial starts.

https://docs.wandb.ai/models/sweeps/define-sweep-configuration says what they may hold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalens.config import Config, ConfigError, load_config
from megalens.sweep import SweepError

METHODS = ("grid", "random", "bayes")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")  # what W&B runs when a file names no command
METRIC = "train/loss"  # smallest, where a file names none
_LOG = ("log_uniform", "log_uniform_values")
_KNOWN = ("constant", "categorical", "uniform", "int_uniform", "q_uniform", *_LOG)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``: whole ones, multiples of ``step``, or even in the logarithm."""

    low: float
    high: float
    whole: bool = False
    step: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Halving:
    """``early_terminate``: looks after ``min_iter``, ``min_iter * eta``, ... values of the metric; the best 1 in ``eta`` goes on."""

    min_iter: int
    eta: int


@dataclass(frozen=True)
class SweepFile:
    """A sweep.

    ``fixed`` holds what all trials share, ``choices`` lists to choose from and ``ranges`` numbers to draw from, each by dotted key.
    ``run_cap`` is None where the file sets no end.
    """

    name: str
    program: str
    method: str
    command: tuple[str, ...]
    metric: str
    maximize: bool
    run_cap: int | None
    halving: Halving | None
    fixed: dict[str, Any]
    choices: dict[str, list]
    ranges: dict[str, Range]

    @property
    def searched(self) -> list[str]:
        """The keys in which trials differ."""
        return [*self.choices, *self.ranges]

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the choices; the last key changes fastest."""
        return (dict(zip(self.choices, point, strict=True)) for point in itertools.product(*self.choices.values()))

    def config(self, point: dict[str, Any]) -> Config:
        """The configuration of a trial.

        Raises:
            ConfigError: it is refused.
        """
        return load_config([f"{key}={_text(value)}" for key, value in {**self.fixed, **point}.items()])


def read_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file: its form, that its parameters are keys of ours, and that each value is accepted.

    Raises:
        SweepError: in one line that names the mend.
    """
    if not path.is_file():
        raise SweepError(f"sweep file {path} does not exist; ls sweeps/ shows those that come with megalens")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    try:
        sweep = _parse(path.stem, content)
        _check_values(sweep)
    except (SweepError, ConfigError) as error:
        raise SweepError(f"{path}: {error}") from None
    return sweep


def _parse(name: str, content: Any) -> SweepFile:
    _require(isinstance(content, dict) and bool(content.get("parameters")), "a sweep has method:, program:, metric: and parameters:")
    method, metric, stop = content.get("method"), content.get("metric") or {}, content.get("early_terminate")
    _require(method in METHODS, f"method: {method} must be one of: {', '.join(METHODS)}")
    program = content.get("program")
    _require(isinstance(program, str), "program: is missing; tools/run_pipeline.py, or megalens/train.py on data that is there")
    _require(isinstance(metric, dict), "metric: has name: and goal:, e.g. metric: {name: val/loss, goal: minimize}")
    goal = metric.get("goal", "minimize")
    _require(goal in ("minimize", "maximize"), f"metric.goal: {goal} must be minimize or maximize")
    fixed, choices, ranges = {}, {}, {}
    for key, parameter in _flat(content["parameters"]):
        found = _parameter(key, parameter)
        _require(method != "grid" or not isinstance(found, Range), f"{key}: a grid needs values: [...], not a range")
        target = ranges if isinstance(found, Range) else choices if isinstance(found, list) and "values" in parameter else fixed
        target[key] = found
    cap = content.get("run_cap")
    _require(cap is None or (_is_whole(cap) and cap > 0), f"run_cap: {cap} must be a whole number greater than 0")
    command = tuple(str(part) for part in content.get("command") or COMMAND)
    metric = metric.get("name") or METRIC
    return SweepFile(name, program, method, command, metric, goal == "maximize", cap, _halving(stop), fixed, choices, ranges)


def _halving(stop: Any) -> Halving | None:
    if stop is None:
        return None
    _require(isinstance(stop, dict) and stop.get("type") == "hyperband", "early_terminate.type must be hyperband")
    first, eta = stop.get("min_iter"), stop.get("eta", 3)
    _require(
        _is_whole(first) and first > 0, "early_terminate.min_iter must be a whole number greater than 0 (max_iter with s is W&B's only)"
    )
    _require(_is_whole(eta) and eta > 1, f"early_terminate.eta: {eta} must be a whole number greater than 1")
    return Halving(first, eta)


def _flat(parameters: Any, prefix: str = "") -> Iterator[tuple[str, dict]]:
    """Parameters by dotted key; nested ``parameters:`` are opened."""
    _require(isinstance(parameters, dict), f"{prefix}parameters: is a mapping of names")
    for key, parameter in parameters.items():
        _require(isinstance(parameter, dict), f"{key}: write {key}: {{value: ...}} or {key}: {{values: [...]}}")
        if "parameters" in parameter:
            yield from _flat(parameter["parameters"], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", parameter


def _parameter(key: str, parameter: dict) -> Any:
    """A fixed value, a list of choices or a :class:`Range`."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        _require(isinstance(parameter["values"], list) and bool(parameter["values"]), f"{key}.values: is a list that holds something")
        _require("probabilities" not in parameter, f"{key}.probabilities: offline sweeps draw evenly; run this one under wandb agent")
        return parameter["values"]
    low, high = parameter.get("min"), parameter.get("max")
    _require(_is_number(low) and _is_number(high), f"{key}: needs value:, values: or min: and max: (numbers; 1.0e-5, not 1e-5, in YAML)")
    _require(low < high, f"{key}: min: {low} must be less than max: {high}")
    kind = parameter.get("distribution", "int_uniform" if _is_whole(low) and _is_whole(high) else "uniform")
    _require(kind in _KNOWN, f"{key}.distribution: {kind} is not known offline; there are: {', '.join(_KNOWN)}")
    if kind == "log_uniform":
        low, high = math.exp(low), math.exp(high)
    _require(kind not in _LOG or low > 0, f"{key}: min: {low} must be greater than 0")
    return Range(low, high, kind == "int_uniform", parameter.get("q", 1) if kind == "q_uniform" else None, kind in _LOG)


def _check_values(sweep: SweepFile) -> None:
    """Each value of each parameter, beside the first of the others, must be a setting that is accepted."""
    ends = {key: [_end(r, r.low), _end(r, r.high)] for key, r in sweep.ranges.items()}
    values = {**sweep.choices, **ends}
    first = {key: options[0] for key, options in values.items()}
    sweep.config(first)
    for key, options in values.items():
        for option in options[1:]:
            sweep.config({**first, key: option})
    data = ("dataset.", "activation_dumper.", "pretokenize.", "tokenizer_name")
    shared = [key for key in sweep.searched if key.startswith(data) and key != "activation_dumper.root"]
    if shared and "activation_dumper.root" not in sweep.searched:
        raise SweepError(
            f"{shared[0]} changes the dump that all trials share; run one sweep per value, each with its activation_dumper.root"
        )


def _end(numbers: Range, end: float) -> float | int:
    return int(end) if numbers.whole else end


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise SweepError(message)
