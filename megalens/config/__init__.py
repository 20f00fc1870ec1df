"""Every setting of megalens: its schema, how files and arguments are read, what may not go together, how it is printed."""

from __future__ import annotations

from megalens.config.fields import ConfigError, Schedule, Weight
from megalens.config.method import Gates, Policy, Reward, Rollouts
from megalens.config.reading import config_from_dict, config_to_dict, config_to_yaml, load_config
from megalens.config.roles import (
    Lora,
    LrMultipliers,
    LrScheduler,
    Reconstructor,
    ReconstructorRates,
    Reference,
    RoleLora,
    Verbalizer,
    VerbalizerRates,
)
from megalens.config.rules import validate
from megalens.config.running import Checkpoint, EarlyTermination, Evaluation, Fsdp, Validation, Wandb
from megalens.config.schema import Config
from megalens.config.text import ActivationDumper, Dataset, Given, Pretokenize

__all__ = [
    "ActivationDumper",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Dataset",
    "EarlyTermination",
    "Evaluation",
    "Fsdp",
    "Gates",
    "Given",
    "Lora",
    "LrMultipliers",
    "LrScheduler",
    "Policy",
    "Pretokenize",
    "Reconstructor",
    "ReconstructorRates",
    "Reference",
    "Reward",
    "RoleLora",
    "Rollouts",
    "Schedule",
    "Validation",
    "Verbalizer",
    "VerbalizerRates",
    "Wandb",
    "Weight",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "validate",
]
