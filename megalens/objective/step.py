"""Where in the training a loss is taken, and what every schedule says there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalens.config import Config
from megalens.config.rules import schedules
from megalens.schedule import Clock, schedule_value


@dataclass(frozen=True)
class Step:
    """One place in the training.

    Args:
        update: the optimizer step; the noise is a function of it.
        values: of every schedule, by its key in the configuration (``mse_weight``, ``gumbel_tau_schedule``, ...).
    """

    update: int
    values: Mapping[str, float]

    @classmethod
    def at(cls, config: Config, micro_step: int, clock: Clock) -> Step:
        """The place of a micro-step."""
        values = {key: schedule_value(schedule, micro_step, clock) for key, schedule in schedules(config)}
        return cls(micro_step // clock.steps_per_update, values)

    @classmethod
    def fixed(cls, config: Config, update: int = 0, **values: float) -> Step:
        """An optimizer step with every schedule as it starts, but for those that are given by their key."""
        return cls(update, {key: schedule.ends[0] for key, schedule in schedules(config)} | values)
