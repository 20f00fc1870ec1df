"""What a DeepSpeed file may hold, as data: which keys, who decides them, and what megalens' engine cannot carry."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

# Sections that DeepSpeed reads by a model of its own, and what one looks like.
SECTIONS = {
    "zero_optimization": '{"stage": 2}',
    "bf16": '{"enabled": "auto"}',
    "data_types": '{"grad_accum_dtype": "auto"}',
    "optimizer": '{"type": "auto", "params": {"lr": "auto"}}',
    "optimizer.params": '{"lr": "auto"}',
    "activation_checkpointing": "{}",
    "aio": '{"block_size": 1048576}',
    "checkpoint": "{}",
    "comet": '{"enabled": false}',
    "comms_logger": '{"enabled": false}',
    "csv_monitor": '{"enabled": false}',
    "flops_profiler": '{"enabled": false}',
    "nebula": '{"enabled": false}',
    "tensorboard": '{"enabled": false}',
    "timers": "{}",
    "wandb": '{"enabled": false}',
}
FLAGS = {
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
}
NUMBERS = {"gradient_predivide_factor", "steps_per_print", "vocabulary_size"}
CHOICES = {"communication_data_type": ("fp32", "bf16", "fp16")}
DECIDED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}

# What megalens does otherwise, or not at all: refused where it is on.
INSTEAD = {
    "amp": "the setting is dtype (bf16 or fp32)",
    "autotuning": "megalens plan finds what fits",
    "bfloat16": "the section is called bf16",
    "compile": "the setting is compile",
    "compression_training": "megalens does not compress",
    "curriculum_learning": "the order of samples is a function of seed",
    "data_efficiency": "the order of samples is a function of seed",
    "eigenvalue": "megalens does not quantize in training",
    "elasticity": "a run goes on with any number of processes as it is",
    "expert_parallel": "the setting is engine=fsdp with fsdp.tensor_ranks",
    "fp16": "the setting is dtype (bf16 or fp32)",
    "hybrid_engine": "rollouts are made by megalens",
    "pipeline": "the setting is engine=fsdp with fsdp.tensor_ranks",
    "progressive_layer_drop": "the subject keeps all of its blocks",
    "quantize_training": "megalens does not quantize in training",
    "scheduler": "the setting is lr_scheduler",
    "sequence_parallel_size": "the setting is engine=fsdp with fsdp.tensor_ranks",
    "sparse_attention": "attention is the subject's own",
    "sparse_gradients": "embeddings are not trained",
    "tensor_parallel": "the setting is engine=fsdp with fsdp.tensor_ranks",
    "torch_autocast": "the setting is dtype (bf16 or fp32)",
    "weight_quantization": "megalens does not quantize in training",
}
ON_WITHOUT_ENABLED = {"compression_training", "expert_parallel", "scheduler", "tensor_parallel", "weight_quantization"}

# The only value of a key with which the engine's weights, moments, norms and skipped steps are what they are called.
FIXED: dict[str, tuple[Any, str]] = {
    "bf16.bf16_master_weights_and_grads": (False, "weights and gradients have float32 masters"),
    "bf16.bf16_optimizer_states": (False, "the optimizer's state is float32"),
    "bf16.check_grad_overflow": (True, "a step whose gradient is not finite is skipped"),
    "data_types.buffer_dtype": (None, "buffers keep the subject's dtype"),
    "data_types.param_dtype": (None, "the setting is dtype"),
    "gradient_allreduce_op": ("mean", "gradients are averaged"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is torch's"),
    "zero_optimization.compute_grad_norm": (True, "the gradient's norm is logged and clipped"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "the optimizer's state lies in one place"),
    "zero_optimization.offload_optimizer.super_offload": (False, "the optimizer is torch's"),
    "zero_optimization.zenflow": (None, "every step moves every weight"),
    "zero_optimization.zero_hpz_partition_size": (1, "ZeRO++ keeps second copies that a resumed run would not fill"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients are exact"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "weights are exact"),
    "zero_optimization.zero_quantized_weights": (False, "weights are exact"),
}
# Of optimizer.params, beside what the configuration decides: how torch's AdamW and SGD are called here. None: any value means the same.
OPTIMIZER_PARAMS: dict[str, tuple[Any, ...] | None] = {
    "adam_w_mode": (True,),
    "amsgrad": (False,),
    "bias_correction": (True,),
    "dampening": (0,),
    "eps": (1e-8,),
    "fused": None,
    "maximize": (False,),
    "momentum": (0,),
    "nesterov": (False,),
    "torch_adam": None,
}


def same(said: Any, value: Any) -> bool:
    """Are two values of a file equal? A truth is no number."""
    return said == value and isinstance(said, bool) == isinstance(value, bool)


def stated(place: str, value: Any) -> str:
    """A place and what it holds, as the file spells it."""
    return f"{place}={json.dumps(value)}"


def without_blanks(values: dict) -> dict:
    """What a file states: without ``null`` and ``"auto"``, which leave a place to its default."""
    cleaned = ((key, without_blanks(value) if isinstance(value, dict) else value) for key, value in values.items())
    return {key: value for key, value in cleaned if value is not None and value != "auto"}


def look_up(values: dict, place: str) -> Any:
    """What stands at a dotted place; None: nothing."""
    found: Any = values
    for part in place.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def take_shapes(found: dict) -> Iterator[str]:
    """Tell what is no section, flag or number where one must be, and take that and all that is off out of ``found``."""
    for name, mend in INSTEAD.items():
        if name in found and _is_on(name, found.pop(name)):
            yield f"take out the section {name}; {mend}"
    for place, example in SECTIONS.items():
        section, _, inner = place.rpartition(".")
        holder: Any = look_up(found, section) if section else found
        if isinstance(holder, dict) and not isinstance(holder.get(inner, {}), dict):
            yield f"{stated(place, holder.pop(inner))} must be a section, e.g. {example}; or leave it out"
    for name, value in list(found.items()):
        wanted = _wanted_of(name, value)
        if wanted is not None:
            del found[name]
            yield f"{stated(name, value)} {wanted}"


def check_values(found: dict) -> Iterator[str]:
    """Tell what the engine cannot carry, and what of ``optimizer.params`` is not how the optimizer is called."""
    for place, (value, why) in FIXED.items():
        said = look_up(found, place)
        if said is not None and not same(said, value):
            yield f"{stated(place, said)} cannot be had: {why}; leave it out"
    params = look_up(found, "optimizer.params") or {}
    for name, said in params.items():
        if name in ("lr", "betas", "weight_decay"):
            continue
        if name not in OPTIMIZER_PARAMS:
            yield f"{stated(f'optimizer.params.{name}', said)} is not taken from here; leave it out{_near(name, OPTIMIZER_PARAMS)}"
        elif (allowed := OPTIMIZER_PARAMS[name]) is not None and not any(same(said, value) for value in allowed):
            yield f"{stated(f'optimizer.params.{name}', said)} cannot be had, only {json.dumps(allowed[0])}; leave it out"
    for name in (found.get("optimizer") or {}).keys() - {"type", "params", "legacy_fusion"}:
        yield f"optimizer.{name} is no key of DeepSpeed's; leave it out{_near(name, ('type', 'params'))}"


def _is_on(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled", bool(value) and name in ON_WITHOUT_ENABLED) not in (False, "auto") or bool(value.get("deepcompile"))
    return value is True or value not in (None, False, "auto", 1)  # 1: of ranks


def _wanted_of(name: str, value: Any) -> str | None:
    """What a key of the outermost level must hold, in words, where it does not; None: it does."""
    if name in SECTIONS or name in DECIDED or name in FIXED or name.startswith(("_", "#", "/")):
        return None
    if name in FLAGS:
        return None if isinstance(value, bool) else "must be true or false"
    if name in NUMBERS:
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        return None if number else "must be a number greater than 0"
    if name in CHOICES:
        return None if value in CHOICES[name] else f"must be one of: {', '.join(CHOICES[name])}"
    known = {*SECTIONS, *FLAGS, *NUMBERS, *CHOICES, *DECIDED, *INSTEAD} | {place for place in FIXED if "." not in place}
    return f"is no key of DeepSpeed's that megalens knows; leave it out{_near(name, known)}"


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f" (did you mean {near[0]}?)" if near else ""
