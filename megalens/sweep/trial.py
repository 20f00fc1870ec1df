"""A training that is one trial of a W&B sweep: what its agent tells it through the environment."""

from __future__ import annotations

import dataclasses
import os

from megalens.config import Config
from megalens.training.track import sweep_id

OFFLINE = "MEGALENS_SWEEP"  # set for the trials of an offline sweep: its name, unlike that of any other
VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", OFFLINE)


def any_sweep() -> str | None:
    """The sweep, W&B's or offline, that this process is a trial of."""
    return sweep_id() or os.environ.get(OFFLINE)


def as_trial(config: Config) -> Config:
    """Under an agent, the configuration with a run folder of the trial's own: the same one when W&B hands the trial out again.

    It logs online, as the sweep's server waits for its metric, unless the environment's WANDB_MODE says otherwise.
    """
    run_id = os.environ.get("WANDB_RUN_ID")
    if sweep_id() is None or not run_id:
        return config
    mode = config.wandb.mode if config.wandb.mode == "disabled" else os.environ.get("WANDB_MODE", "online")
    wandb = dataclasses.replace(config.wandb, mode=mode)
    return dataclasses.replace(config, run_name=f"{config.run_name or 'run'}-{run_id}", wandb=wandb)


def outside_the_sweep() -> dict[str, str]:
    """The environment without what makes a training the sweep's trial, for trainings that all its trials share."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}
