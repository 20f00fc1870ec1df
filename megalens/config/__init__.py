"""Every setting of megalens: its schema, how files and arguments are read, what may not go together, how it is printed."""

from __future__ import annotations

from megalens.config.reading import config_from_dict, config_to_dict, config_to_yaml, load_config
from megalens.config.rules import validate
from megalens.config.schema import (
    ActivationDumper,
    Checkpoint,
    Config,
    ConfigError,
    Dataset,
    EarlyTermination,
    Evaluation,
    Fsdp,
    Lora,
    LrMultipliers,
    LrScheduler,
    Pretokenize,
    Reconstructor,
    ReconstructorRates,
    Schedule,
    Validation,
    Verbalizer,
    VerbalizerRates,
    Wandb,
    Weight,
)

__all__ = [
    "ActivationDumper",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Dataset",
    "EarlyTermination",
    "Evaluation",
    "Fsdp",
    "Lora",
    "LrMultipliers",
    "LrScheduler",
    "Pretokenize",
    "Reconstructor",
    "ReconstructorRates",
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
