"""A DeepSpeed configuration file made whole: ``"auto"`` is what our configuration says, and what contradicts it is refused."""

from __future__ import annotations

import json
from typing import Any

from megalens import shipped
from megalens.config import Config
from megalens.device import resolve_dtype
from megalens.engine.base import EngineError


def zero_stage(config: Config) -> int:
    """The ZeRO stage of the file that ``config.deepspeed`` names."""
    return _stage(config, _read(config))


def resolve(config: Config, ranks: int) -> dict:
    """The file's content with every ``"auto"`` replaced.

    Raises:
        EngineError: it cannot be read, contradicts the configuration, or asks for what megalens does otherwise.
    """
    found = _read(config)
    _stage(config, found)
    _check_nvme(config, found)
    for section, instead in (("scheduler", "lr_scheduler"), ("fp16", "dtype (bf16 or fp32)"), ("amp", "dtype (bf16 or fp32)")):
        if found.get(section, {}).get("enabled", section == "scheduler" and section in found):
            raise EngineError(f"{config.deepspeed}: take out the section {section}; the setting is {instead}")
    for path, (value, key) in _wanted(config, ranks).items():
        _settle(found, path, value, key, _file(config))
    if resolve_dtype(config) == "float32":  # there is nothing to accumulate more exactly
        found.pop("data_types", None)
    del found["optimizer"]  # held against the configuration above; the engine makes it
    left = _autos(found)
    if left:
        raise EngineError(f'{config.deepspeed}: {left[0]} cannot be "auto"; give it a value or leave it out')
    return {"steps_per_print": None, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **found}


def _wanted(config: Config, ranks: int) -> dict[str, tuple[Any, str]]:
    """What the file must say at each place, and the key that decides it."""
    accumulation = config.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": (config.batch_size // ranks, "batch_size / processes"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (config.batch_size * accumulation, "batch_size * gradient_accumulation_steps"),
        "gradient_clipping": (config.grad_clip, "grad_clip"),
        "bf16.enabled": (resolve_dtype(config) == "bfloat16", f"dtype={config.dtype}"),
        "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32"),
        "optimizer.type": ({"adamw": "AdamW", "sgd": "SGD"}[config.optimizer], f"optimizer={config.optimizer}"),
        "optimizer.params.lr": (config.learning_rate, "learning_rate"),
        "optimizer.params.betas": (list(config.betas), "betas"),
        "optimizer.params.weight_decay": (config.weight_decay, "weight_decay"),
    }


def _settle(found: dict, path: str, value: Any, key: str, file: str) -> None:
    *sections, name = path.split(".")
    for section in sections:
        found = found.setdefault(section, {})
    said = found.get(name, "auto")
    if said not in ("auto", value):
        raise EngineError(f'{file}: {path}={said} contradicts {key} ({value}); write "auto" there, or change the setting')
    found[name] = value


def _file(config: Config) -> str:
    if config.deepspeed is None:
        raise EngineError("deepspeed names no file; name one, as in deepspeed=ds_configs/z2.json")
    return config.deepspeed


def _read(config: Config) -> dict:
    path = shipped.find(_file(config))
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise EngineError(f"deepspeed={path} does not exist; there are: {', '.join(known) or 'ds_configs/z1.json, z2, z3, z3_offload'}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise EngineError(f"{path} holds no JSON object")
    return found


def _stage(config: Config, found: dict) -> int:
    stage = found.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise EngineError(f"{config.deepspeed}: zero_optimization.stage={stage} must be 0, 1, 2 or 3")
    return stage


def _check_nvme(config: Config, found: dict) -> None:
    for section in ("offload_param", "offload_optimizer"):
        if found.get("zero_optimization", {}).get(section, {}).get("device") == "nvme":
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not AsyncIOBuilder().is_compatible(verbose=False):
                mend = 'install libaio-dev and a C++ compiler, or write "device": "cpu"'
                raise EngineError(f"{config.deepspeed}: {section} to nvme needs DeepSpeed's async_io, which cannot be built here; {mend}")


def _autos(values: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += _autos(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"] if value == "auto" else []
    return found
