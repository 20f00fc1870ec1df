"""Sweep files as W&B reads them, checked against our own settings before a trial starts.

https://docs.wandb.ai/models/sweeps/define-sweep-configuration says what they may hold.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalens.config import Config, ConfigError, load_config
from megalens.config.reading import kind_of
from megalens.config.yaml_core import read_yaml
from megalens.sweep import SweepError

METHODS = ("grid", "random", "bayes")
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")  # what W&B runs when a file names no command
METRIC = "train/loss"  # smallest, where a file names none
_PREFIXES = ("train/", "val/", "perf/")  # of every figure that a training logs
_LOG = ("log_uniform", "log_uniform_values")
_LARGEST_EXPONENT = math.log(sys.float_info.max)
_SETTINGS_MACROS = (
    "args",
    "args_no_equals",
    "args_no_hyphens",
    "args_no_boolean_flags",
    "args_json",
    "args_append_hydra",
    "args_override_hydra",
)
_ENVIRONMENT_MACRO = re.compile(r"\$\{envvar:[A-Z0-9_]*\}")
_WHOLE = "{key}: takes whole numbers only; write distribution: int_uniform, or q_uniform with whole min:, max: and q:"
_KNOWN = ("constant", "categorical", "uniform", "int_uniform", "q_uniform", *_LOG)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``: whole ones, in steps of ``step``, or even in the logarithm."""

    low: float
    high: float
    whole: bool = False
    step: float | None = None
    log: bool = False

    def samples(self) -> list[float | int]:
        """Some of the numbers: the least, the greatest and one between, as a trial gets them."""
        between = math.sqrt(self.low) * math.sqrt(self.high) if self.log else (self.low + self.high) / 2
        if self.step is not None:
            between = min(self.low + self.step, self.high)
        return [int(number) if self.whole else float(number) for number in (self.low, self.high, between)]


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
        return load_config([f"{key}={_text(value)}" for key, value in {**self.fixed, **point}.items()], "the sweep file")


def read_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file: its form, that its parameters are keys of ours, and that each value is accepted.

    Raises:
        SweepError: in one line that names the mend.
    """
    if not path.is_file():
        raise SweepError(f"sweep file {path} does not exist; ls sweeps/ shows those that come with megalens")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), _is_text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    try:
        sweep = _parse(path.stem, content)
        _check_values(sweep)
        _check_metric(sweep.metric)
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
    fixed: dict[str, Any] = {}
    choices: dict[str, list] = {}
    ranges: dict[str, Range] = {}
    for key, parameter in _flat(content["parameters"]):
        found = _parameter(key, parameter)
        _require(method != "grid" or not isinstance(found, Range), f"{key}: a grid needs values: [...], not a range")
        target = ranges if isinstance(found, Range) else choices if isinstance(found, list) and "values" in parameter else fixed
        target[key] = found
    cap = content.get("run_cap")
    _require(cap is None or (_is_whole(cap) and cap > 0), f"run_cap: {cap} must be a whole number greater than 0")
    command, metric = _command(content.get("command"), program), metric.get("name") or METRIC
    _require(isinstance(metric, str), f"metric.name: {metric} must be text, e.g. val/loss")
    return SweepFile(name, program, method, command, metric, goal == "maximize", cap, _halving(stop), fixed, choices, ranges)


def _is_text(path: tuple[str, ...]) -> bool:
    """Are these the keys of a parameter's value (or values) for a setting of text?"""
    keys = [key for key in path[1:-1] if key != "parameters"]
    is_value = path[:1] == ("parameters",) and path[-1] in ("value", "values")
    return is_value and "str" in str(kind_of(".".join(keys)))


def _command(parts: Any, program: str) -> tuple[str, ...]:
    """The command of a trial: text and macros. One of the macros must hand on the trial's settings."""
    if parts is None:
        return COMMAND
    form = f"command: is a list of text and macros, e.g. [{', '.join(COMMAND)}]"
    _require(isinstance(parts, list) and bool(parts) and all(_is_number(part) or isinstance(part, str) for part in parts), form)
    ours = Path(program).name in ("train.py", "run_pipeline.py")
    settings = ("args", "args_no_hyphens") if ours else _SETTINGS_MACROS
    known = [f"${{{name}}}" for name in ("env", "interpreter", "program", *settings)]
    for part in map(str, parts):
        rest = _ENVIRONMENT_MACRO.sub("", part)
        _require(part in known or "${" not in rest, f"command: '{part}' is no macro that runs here; there are: {', '.join(known)}")
    handed_on = known[3:]
    _require(any(part in handed_on for part in parts), f"command: hands no settings to the trial; add {' or '.join(handed_on)}")
    return tuple(map(str, parts))


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
    low: Any = parameter.get("min")
    high: Any = parameter.get("max")
    _require(_is_number(low) and _is_number(high), f"{key}: needs value:, values: or min: and max: (numbers)")
    _require(low < high, f"{key}: min: {low} must be less than max: {high}")
    _require(math.isfinite(float(high) - float(low)), f"{key}: min: {low} and max: {high} must be finite, and their difference too")
    kind = parameter.get("distribution", "int_uniform" if _is_whole(low) and _is_whole(high) else "uniform")
    _require(kind in _KNOWN, f"{key}.distribution: {kind} is not known offline; there are: {', '.join(_KNOWN)}")
    return _range(key, kind, low, high, parameter.get("q", 1))


def _range(key: str, kind: str, low: float, high: float, step: Any) -> Range:
    whole = _is_whole(low) and _is_whole(high)
    if kind == "log_uniform":
        _require(high <= _LARGEST_EXPONENT, f"{key}: log_uniform takes logarithms; write distribution: log_uniform_values for values")
        low, high = math.exp(low), math.exp(high)
    _require(kind not in _LOG or low > 0, f"{key}: min: {low} must be greater than 0")
    _require(kind != "int_uniform" or whole, f"{key}: int_uniform needs whole min: and max:, not {low} and {high}")
    if kind != "q_uniform":
        return Range(low, high, whole=kind == "int_uniform", log=kind in _LOG)
    _require(_is_number(step) and step > 0, f"{key}.q: {step} must be a number greater than 0")
    return Range(low, high, whole=whole and _is_whole(step), step=step)


def _check_values(sweep: SweepFile) -> None:
    """Each value of each parameter, beside the first of the others, must be a setting that is accepted."""
    values = {**sweep.choices, **{key: numbers.samples() for key, numbers in sweep.ranges.items()}}
    first = {key: options[0] for key, options in values.items()}
    chosen = {key: first[key] for key in sweep.choices}
    for key, numbers in sweep.ranges.items():
        _require(numbers.whole or not _takes_whole_numbers(sweep, chosen, key, numbers), _WHOLE.format(key=key))
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


def _check_metric(metric: str) -> None:
    names = " or ".join(_PREFIXES[:2])
    _require(metric.startswith(_PREFIXES), f"metric.name: {metric} is no figure of a training; names begin with {names}, e.g. val/loss")


def _takes_whole_numbers(sweep: SweepFile, point: dict[str, Any], key: str, numbers: Range) -> bool:
    """Is ``2`` a value of this key, and ``2.0`` none?"""
    sample = numbers.samples()[1]
    return _is_accepted(sweep, {**point, key: round(sample)}) and not _is_accepted(sweep, {**point, key: float(sample)})


def _is_accepted(sweep: SweepFile, point: dict[str, Any]) -> bool:
    try:
        sweep.config(point)
    except ConfigError:
        return False
    return True


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise SweepError(message)
