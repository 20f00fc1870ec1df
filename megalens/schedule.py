"""Durations and value schedules: pure functions of the training step.

A duration is a string with a unit (``"500s"`` micro-steps, ``"100os"`` optimizer steps, ``"2e"`` epochs) or a plain
number of micro-steps. The number may have an exponent: ``"1e6s"``. A *micro-step* is one global batch of ``batch_size``
samples; an *optimizer step* is ``gradient_accumulation_steps`` of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_LARGEST = 1e30  # times the steps of an epoch it is still finite
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(os|s|steps|e|epochs)?\s*$")


@dataclass(frozen=True)
class Clock:
    """How steps relate: micro-steps per epoch and per optimizer step, and how many micro-steps the training has.

    ``early_end`` is the micro-step at which it ends all the same (None: at its end); schedules go by ``total_steps``.
    """

    steps_per_epoch: int
    steps_per_update: int
    total_steps: int
    early_end: int | None = None

    @property
    def last_step(self) -> int:
        """The micro-step at which this training ends."""
        return self.total_steps if self.early_end is None else min(self.total_steps, self.early_end)


def parse_duration(text: str | int | float) -> tuple[float, str]:
    """Split a duration into (number, unit), the unit one of ``s``, ``os``, ``e``.

    Raises:
        ValueError: the text is no duration.
    """
    match = _DURATION.match(str(text))
    if match is None:
        raise ValueError(f'\'{text}\' is no duration: write e.g. "500s" (micro-steps), "100os" (optimizer steps) or "2e" (epochs)')
    number, unit = float(match[1]), {"steps": "s", "epochs": "e"}.get(match[2] or "s", match[2] or "s")
    if number > _LARGEST:
        raise ValueError(f"'{str(text)[:20]}...' is no duration: the number is too large")
    if unit != "e" and number != int(number):
        raise ValueError(f"'{text}': only epochs may be fractional")
    return number, unit


def duration_text(number: float, unit: str) -> str:
    """The duration that :func:`parse_duration` splits into this number and unit, to the last digit."""
    return f"{int(number) if number == int(number) else number!r}{unit}"


def duration_steps(text: str | int | float, clock: Clock) -> int:
    """The duration in micro-steps, at least 0."""
    number, unit = parse_duration(text)
    scale = {"s": 1, "os": clock.steps_per_update, "e": clock.steps_per_epoch}[unit]
    return round(number * scale)


def schedule_value(schedule, step: int, clock: Clock) -> float:
    """The value of a :class:`megalens.config.Schedule` at micro-step ``step``.

    ``constant`` is ``value`` throughout. The others hold ``start_value`` for ``constant_steps_before_decay``, then go to
    ``end_value`` over ``num_steps`` (``-1``: until the training's end): ``linear`` straight, ``cosine`` along half a
    cosine, ``exponential`` in equal ratios; ``step`` goes there at once.
    """
    if schedule.type == "constant":
        return schedule.value
    held = duration_steps(schedule.constant_steps_before_decay, clock)
    if schedule.type == "step":
        return schedule.start_value if step < held else schedule.end_value
    length = clock.total_steps - held if str(schedule.num_steps) == "-1" else duration_steps(schedule.num_steps, clock)
    progress = 1.0 if step >= held + length else max(0.0, (step - held) / max(1, length))
    start, end = schedule.start_value, schedule.end_value
    if schedule.type == "linear":
        value = start + (end - start) * progress
    elif schedule.type == "cosine":
        value = end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
    else:  # exponential
        value = start * (end / start) ** progress
    return min(max(value, min(start, end)), max(start, end))  # rounding leads out of very unequal ends


def lr_factor(scheduler, step: int, clock: Clock) -> float:
    """Multiplier of the learning rate at micro-step ``step``: linear warm-up, then the decay of ``scheduler.type``."""
    warmup = duration_steps(scheduler.warmup_steps, clock)
    if step < warmup:
        return scheduler.warmup_start_factor + (1 - scheduler.warmup_start_factor) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, clock.total_steps - warmup))
    if scheduler.type == "linear":
        return 1 + (scheduler.end_factor - 1) * progress
    if scheduler.type == "cosine":
        return scheduler.end_factor + (1 - scheduler.end_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
