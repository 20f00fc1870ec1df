"""A DeepSpeed configuration file made whole: ``"auto"`` is what our configuration says, and what contradicts it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from megalens import shipped
from megalens.config import Config
from megalens.device import resolve_device, resolve_dtype
from megalens.engine.base import EngineError
from megalens.engine.ds_package import complaint, complaints_of_section, import_deepspeed
from megalens.engine.ds_schema import check_values, look_up, same, stated, take_shapes, without_blanks


class DeepSpeedFileError(EngineError):
    """A DeepSpeed file cannot be used.

    Attributes:
        complaints: all that is wrong with it, a line each.
    """

    def __init__(self, file: str, complaints: list[str]):
        self.complaints = tuple(f"{file}: {each}" for each in complaints)
        super().__init__("\n".join(self.complaints))


def zero_stage(config: Config) -> int:
    """The ZeRO stage of the file that ``config.deepspeed`` names.

    Raises:
        EngineError: the file cannot be read, or names no stage.
    """
    found = _read(config)
    wrong = _wrong_stage(found)
    if wrong is not None:
        raise DeepSpeedFileError(_file(config), [wrong])
    return int(look_up(found, "zero_optimization.stage") or 0)


def resolve(config: Config, ranks: int) -> dict:
    """The file's content with every ``"auto"`` replaced; DeepSpeed has been asked what it thinks of it.

    An ``"auto"`` or ``null`` that the configuration does not decide is DeepSpeed's default.

    Raises:
        EngineError: it cannot be read, contradicts the configuration, asks for what megalens does otherwise, or DeepSpeed refuses it.
            All complaints come at once.
    """
    read, on_gpu = _read(config), resolve_device(config.device).type == "cuda"
    found = without_blanks(read)
    wrong = _wrong_stage(read)
    complaints = [] if wrong is None else [wrong]
    complaints += take_shapes(found)
    complaints += check_values(found)
    complaints += _settle(found, config, ranks)
    if wrong is None:
        complaints += complaints_of_section(found.get("zero_optimization", {}), on_gpu)
        complaints += _check_nvme(found, on_gpu)
    if resolve_dtype(config) == "float32":  # there is nothing to accumulate more exactly
        found.pop("data_types", None)
    del found["optimizer"]  # held against the configuration; the engine makes it
    found["zero_allow_untested_optimizer"], found["zero_force_ds_cpu_optimizer"] = True, False
    found.setdefault("steps_per_print", None)
    if not complaints and (refused := complaint(found, on_gpu)):
        complaints = [refused]
    if complaints:
        raise DeepSpeedFileError(_file(config), complaints)
    return found


def resolve_frozen(config: Config) -> dict:
    """What the file says of the weights of a module that is only used: how ZeRO-3 shards and keeps them.

    Raises:
        EngineError: the file cannot be read, or DeepSpeed refuses that part of it.
    """
    zero = without_blanks(_read(config)).get("zero_optimization", {})
    zero = {name: value for name, value in zero.items() if name != "offload_optimizer"}
    zero["stage3_prefetch_bucket_size"] = 0  # a read ends before the last block: what was fetched ahead would still be under way
    found = {"zero_optimization": zero}
    complaints = [*take_shapes(found), *check_values(found)]
    complaints += complaints_of_section(found["zero_optimization"], resolve_device(config.device).type == "cuda")
    if complaints:
        raise DeepSpeedFileError(_file(config), complaints)
    return found | {"bf16": {"enabled": resolve_dtype(config) == "bfloat16"}, "train_micro_batch_size_per_gpu": 1, "steps_per_print": None}


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


def _settle(found: dict, config: Config, ranks: int) -> Iterator[str]:
    """Give each place that the configuration decides its value; tell what contradicts it."""
    for place, (value, key) in _wanted(config, ranks).items():
        *sections, name = place.split(".")
        holder = found
        for section in sections:
            holder = holder.setdefault(section, {})
        said = holder.get(name, value)
        holder[name] = value
        if not same(said, value):
            yield f'{stated(place, said)} contradicts {key} ({json.dumps(value)}); write "auto" there, or change the setting'


def _wrong_stage(found: dict) -> str | None:
    zero = found.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if zero == "auto" or (stage is not None and not any(same(stage, known) for known in (0, 1, 2, 3))):
        what = stated("zero_optimization.stage", stage) if stage is not None else stated("zero_optimization", zero)
        return f"{what} must be 0, 1, 2 or 3{', without quotes' if str(stage) in ('0', '1', '2', '3') else ''}"
    return None


def _check_nvme(found: dict, on_gpu: bool) -> Iterator[str]:
    for section in ("offload_param", "offload_optimizer"):
        if look_up(found, f"zero_optimization.{section}.device") == "nvme":
            import_deepspeed(on_gpu)
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not AsyncIOBuilder().is_compatible(verbose=False):
                mend = 'install libaio-dev and a C++ compiler, or write "device": "cpu"'
                yield f"{section} to nvme needs DeepSpeed's async_io, which cannot be built here; {mend}"


# ------------------------------------------------------------------------------------------------------------ the file


def _file(config: Config) -> str:
    if config.deepspeed is None:
        raise EngineError("deepspeed names no file; name one, as in deepspeed=ds_configs/z2.json")
    return config.deepspeed


def _read(config: Config) -> dict:
    path = shipped.find(_file(config))
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise EngineError(f"deepspeed={path} does not exist; there are: {', '.join(known) or 'ds_configs/z1.json, z2, z3, z3_offload'}")
    data = path.read_bytes()
    twice: list[str] = []
    try:
        found = json.loads(data.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _object(pairs, twice), parse_constant=_refuse_constant)
    except RecursionError:
        raise DeepSpeedFileError(str(path), ["is no valid JSON: it is nested too deep"]) from None
    except ValueError as error:
        raise DeepSpeedFileError(str(path), [_not_json(data, error)]) from None
    if not isinstance(found, dict):
        raise DeepSpeedFileError(str(path), ['holds no JSON object, e.g. {"zero_optimization": {"stage": 2}}'])
    if twice:
        raise DeepSpeedFileError(str(path), [f"the key {key} stands there twice in one section; take one out" for key in twice])
    return found


def _object(pairs: list[tuple[str, Any]], twice: list[str]) -> dict:
    keys = [key for key, _ in pairs]
    twice += sorted({key for key in keys if keys.count(key) > 1})
    return dict(pairs)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON's")


def _not_json(data: bytes, error: ValueError) -> str:
    """Say what a file is that is no JSON."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "is written in UTF-16; save it as UTF-8"
    try:
        found = yaml.safe_load(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or data.lstrip().startswith(b"{"):
        return f"is no valid JSON: {error}"
    if "compute_environment" in found or "deepspeed_config" in found:
        inside = found.get("deepspeed_config")
        inside = inside if isinstance(inside, dict) else {}
        named = inside.get("deepspeed_config_file")
        stage = inside.get("zero_stage")
        mend = f"give the file that it names: {named}" if named else f"ds_configs/z{stage if stage in (1, 2, 3) else 2}.json is the like"
        return f"is a configuration of Accelerate (YAML), not DeepSpeed's own JSON; {mend}"
    return "is YAML; DeepSpeed's file is JSON, see ds_configs/z2.json"
