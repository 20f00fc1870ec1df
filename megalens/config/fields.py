"""What settings are made of: documented fields, schedules, and weights that may be schedules."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A setting is wrong. The message is one line for the person at the keyboard, and names the mend."""


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A documented dataclass field; a mutable default is copied for each instance."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Schedule:
    """A value over the training (:func:`megalens.schedule.schedule_value`)."""

    type: str = setting(
        "constant", "constant | linear | cosine | exponential | step", ("constant", "linear", "cosine", "exponential", "step")
    )
    value: float = setting(1.0, "the value of a constant schedule")
    start_value: float = setting(1.0, "where the others start")
    end_value: float = setting(1.0, "where they end")
    constant_steps_before_decay: str = setting("0s", "how long start_value is held first")
    num_steps: str = setting("-1", "how long the way takes (a step takes none); -1: until the end of the training")

    @property
    def ends(self) -> list[float]:
        """The values between which it lies."""
        return [self.value] if self.type == "constant" else [self.start_value, self.end_value]


@dataclass
class Weight(Schedule):
    """A schedule that may be written as a plain number: ``mse_weight: 0.5``. False where it is 0 throughout."""

    def __bool__(self) -> bool:
        return any(self.ends)


def as_weight(value: Any) -> Any:
    """A plain number as a weight; all else as it is."""
    return Weight(value=float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def weight(default: float, text: str) -> Any:
    """A documented field that is a number or a schedule."""
    return setting(Weight(value=default), text)


@dataclass
class WithWeights:
    """A section with weights: a number given for one is a constant schedule."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.type == "Weight":
                setattr(self, f.name, as_weight(getattr(self, f.name)))
