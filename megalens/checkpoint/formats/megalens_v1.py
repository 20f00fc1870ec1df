"""Version 1 of the megalens format, read as the version of now: weights were called by their modules, some settings by other keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalens.checkpoint import CheckpointError
from megalens.lens.names import stable_name

VERSION = 1
# A dotted key of version 1 -> the keys that take its value now. A key that moves is a row here.
MOVED: dict[str, tuple[str, ...]] = {
    "custom_lr_multipliers.projection_layers": ("lr_multipliers.verbalizer.projection", "lr_multipliers.reconstructor.head"),
    "custom_lr_multipliers.prompts": ("lr_multipliers.verbalizer.prompt", "lr_multipliers.reconstructor.prompt"),
    "custom_lr_multipliers.base_model": tuple(
        f"lr_multipliers.{role}.{part}" for role in ("verbalizer", "reconstructor") for part in ("adapters", "blocks")
    ),
}


def config_of_now(config: dict[str, Any], moved: dict[str, tuple[str, ...]] = MOVED) -> dict[str, Any]:
    """A saved configuration with every key where it is now."""
    values = _flat(config)
    for old, keys in moved.items():
        if old in values:
            values |= dict.fromkeys(keys, values.pop(old))
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def weights_of_now(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Saved weights under their stable names.

    Raises:
        CheckpointError: one is no weight of a lens.
    """
    try:
        return {stable_name(name): value for name, value in weights.items()}
    except ValueError as error:
        raise CheckpointError(f"these weights are of no lens: {error}") from None


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
