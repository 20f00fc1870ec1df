"""What a configuration may not say, alone or together: refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import math

from megalens.config.schema import Config, ConfigError
from megalens.schedule import parse_duration


def validate(config: Config) -> None:
    """Refuse values that can not work, alone or together, before anything is loaded.

    Raises:
        ConfigError: naming the key and what it may be.
    """
    _check_each(config, "")
    positive = [
        "t_text",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lora.r",
        "activation_dumper.seq_len",
        "activation_dumper.batch_size",
        "activation_dumper.vectors_per_sequence",
        "activation_dumper.rows_per_shard",
        "activation_dumper.rows_per_batch",
        "evaluation.batch_size",
        "evaluation.bootstrap",
        "validation.num_samples",
        "checkpoint.track_best_n",
    ]
    not_negative = [
        "loader_workers",
        "layer_l",
        "grad_clip",
        "weight_decay",
        "gumbel_noise",
        "activation_dumper.min_pos",
        "mse_weight",
        "kl_base_weight",
        "lm_base_weight",
        "tail_say_weight",
        "tail_read_weight",
        "dataset.min_words",
        "validation.num_examples",
        "fsdp.gather_gb",
        "stall_seconds",
        "evaluation.examples",
        "evaluation.report_documents",
    ]
    for key in positive:
        _require(_get(config, key) > 0, f"{key}={_get(config, key)} must be greater than 0")
    _require(config.fsdp.tensor_ranks > 0, f"fsdp.tensor_ranks={config.fsdp.tensor_ranks} must be greater than 0")
    _require(config.fsdp.tensor_ranks == 1 or config.engine == "fsdp", "fsdp.tensor_ranks needs engine=fsdp")
    _require(config.fsdp.tensor_ranks == 1 or not config.compile, "fsdp.tensor_ranks can not be compiled; set compile=false")
    for key in ["dataset.max_documents", "pretokenize.num_proc", "verbalizer.checkpoint_every_n_tokens", "fsdp.shard_ranks"]:
        _require(_get(config, key) is None or _get(config, key) > 0, f"{key}={_get(config, key)} must be greater than 0, or null")
    for key in not_negative:
        _require(_get(config, key) >= 0, f"{key}={_get(config, key)} must not be negative")
    for key in [
        "lr_scheduler.warmup_steps",
        "validation.interval",
        "checkpoint.save_interval",
        "checkpoint.keep_every",
        "log_interval",
        "max_train_steps",
        "early_termination.steps",
    ]:
        _check_duration(key, _get(config, key))
    for key in ["gumbel_tau_schedule", "alpha_schedule"]:
        _check_duration(f"{key}.constant_steps_before_decay", _get(config, key).constant_steps_before_decay)
        ends = [_get(config, key).start_value, _get(config, key).end_value]
        _require(
            _get(config, key).type != "exponential" or min(ends) > 0,
            f"{key}: an exponential schedule needs ends greater than 0, not {min(ends)}",
        )
        if str(_get(config, key).num_steps) != "-1":
            _check_duration(f"{key}.num_steps", _get(config, key).num_steps)
    tau = config.gumbel_tau_schedule
    taus = [tau.value] if tau.type == "constant" else [tau.start_value, tau.end_value]
    _require(min(taus) > 0, f"gumbel_tau_schedule: tau must be greater than 0, not {min(taus)}")
    _require(len(config.betas) == 2 and all(0 <= b < 1 for b in config.betas), f"betas={config.betas} must be two numbers in [0, 1)")
    _require(0 <= config.lora.dropout < 1, f"lora.dropout={config.lora.dropout} must lie in [0, 1)")
    _require(0 < config.dataset.val_fraction < 1, f"dataset.val_fraction={config.dataset.val_fraction} must lie between 0 and 1")
    dump = config.activation_dumper
    _require(
        dump.min_pos < dump.seq_len,
        f"activation_dumper.min_pos={dump.min_pos} leaves no position in sequences of activation_dumper.seq_len={dump.seq_len}",
    )
    for key in ["activation_dumper.num_samples", "activation_dumper.val_num_samples", "evaluation.num_samples"]:
        _require(_get(config, key) == -1 or _get(config, key) > 0, f"{key}={_get(config, key)} must be -1 (all) or greater than 0")
    _require(
        config.verbalizer.prompt.count("<act>") == 1,
        f"verbalizer.prompt={config.verbalizer.prompt!r} must hold the slot <act> exactly once",
    )
    _require(
        config.max_train_steps is not None or config.num_train_epochs > 0,
        "num_train_epochs must be greater than 0 when max_train_steps is null",
    )
    weights = [
        config.mse_weight,
        config.kl_base_weight,
        config.lm_base_weight,
        config.entropy_weight,
        config.tail_say_weight,
        config.tail_read_weight,
    ]
    _require(any(weights), "every loss weight is 0; set mse_weight, kl_base_weight, lm_base_weight, tail_say_weight or tail_read_weight")
    _require(config.engine == "auto" or config.deepspeed is None, "engine=fsdp needs no deepspeed file; leave one of the two out")
    _require(
        config.kl_base_weight == 0 or config.batch_size % 2 == 0,
        "kl_base_weight needs an even batch_size: each sample is paired with another of the batch",
    )


def _check_each(node, prefix: str) -> None:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            _check_each(value, f"{prefix}{f.name}.")
        elif f.metadata["choices"] and value not in f.metadata["choices"]:
            raise ConfigError(f"{prefix}{f.name}={value} must be one of: {', '.join(f.metadata['choices'])}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{f.name}={value} must be a finite number")


def _check_duration(key: str, value) -> None:
    if value is None:
        return
    try:
        number, _ = parse_duration(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    _require(number > 0 or key.endswith(("warmup_steps", "constant_steps_before_decay")), f"{key}={value} must be greater than 0")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _get(node, key: str):
    for part in key.split("."):
        node = getattr(node, part)
    return node
