"""Where a training stands, and how long it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalens.config import Config
from megalens.schedule import Clock, duration_steps, duration_text


def first_not_finite(weights: dict[str, Tensor]) -> str | None:
    """The name of the first weight that holds NaN or infinity; None when all are finite."""
    return next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)


TRAINER_VERSION = 2


class TrainingError(ValueError):
    """The training cannot go on. The message is one line and names the mend."""


@dataclass
class Progress:
    """Where a training stands; kept in a checkpoint's ``trainer.json``.

    Attributes:
        step: micro-steps taken, always whole optimizer steps.
        skipped: optimizer steps whose loss or gradient was not finite, or whose gradient norm was beyond ``grad_limit``.
        skipped_in_a_row: those of them since the last step that was taken.
        validated, saved: the micro-step of the last validation and of the last save; -1 before the first.
        best: ``[metric, checkpoint name]``, the best first.
        kept: ``[step, checkpoint name]`` of the checkpoints that are never removed.
        window: sums of the training figures since they were last logged.
        window_size: optimizer steps in ``window``.
        curve_lines: lines of ``metrics.jsonl`` at the last save.
        wandb_run: the id of the W&B run.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    validated: int = -1
    saved: int = -1
    best: list[list] = field(default_factory=list)
    kept: list[list] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)
    window_size: int = 0
    curve_lines: int = 0
    wandb_run: str | None = None


def first_wrong(progress: dict[str, Any]) -> str | None:
    """The first entry of a saved :class:`Progress` that is of another kind than a training writes; None: there is none."""
    for each in dataclasses.fields(Progress):
        if each.name in progress and not _KINDS[each.type](progress[each.name]):
            return each.name
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 1 << 62


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[Any, Callable[[Any], bool]] = {
    "int": _is_count,
    "str | None": lambda value: value is None or isinstance(value, str),
    "dict[str, float]": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "list[list]": lambda value: (
        isinstance(value, list)
        and all(isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0]) and isinstance(pair[1], str) for pair in value)
    ),
}


def clock_of(config: Config, steps_per_epoch: int) -> Clock:
    """The training's clock. Its length is rounded down to whole optimizer steps, ``early_termination.steps`` is rounded up.

    Raises:
        TrainingError: it is shorter than one optimizer step.
    """
    accumulation = config.gradient_accumulation_steps
    length = duration_text(config.num_train_epochs, "e") if config.max_train_steps is None else config.max_train_steps
    total = duration_steps(length, Clock(steps_per_epoch, accumulation, 0)) // accumulation * accumulation
    if total == 0:
        key = "num_train_epochs" if config.max_train_steps is None else "max_train_steps"
        raise TrainingError(
            f"{key}={getattr(config, key)} is less than one optimizer step: an epoch is {steps_per_epoch} micro-steps, "
            f"an optimizer step {accumulation} (gradient_accumulation_steps)"
        )
    clock = Clock(steps_per_epoch, accumulation, total)
    if config.early_termination.steps is None:
        return clock
    updates = math.ceil(duration_steps(config.early_termination.steps, clock) / accumulation)
    return dataclasses.replace(clock, early_end=updates * accumulation)


def is_finished(progress: Progress, clock: Clock) -> bool:
    """Whether a training has reached its end, and the last validation and save are done."""
    return progress.step >= clock.last_step and progress.validated == progress.saved == progress.step
