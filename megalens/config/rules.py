"""What a configuration may not say, alone or together: refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megalens.config.fields import ConfigError, Schedule
from megalens.config.schema import Config
from megalens.schedule import duration_text, parse_duration

POSITIVE = (
    "t_text",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "grad_limit",
    "lora.r",
    "activation_dumper.seq_len",
    "activation_dumper.batch_size",
    "activation_dumper.vectors_per_sequence",
    "activation_dumper.rows_per_shard",
    "activation_dumper.rows_per_batch",
    "evaluation.batch_size",
    "rollouts.draws",
    "rollouts.temperature",
    "rollouts.inner_steps",
    "rollouts.imitate_temperature",
    "policy.clip",
    "validation.num_samples",
    "checkpoint.track_best_n",
    "fsdp.tensor_ranks",
)
POSITIVE_OR_NULL = (
    "dataset.max_documents",
    "pretokenize.num_proc",
    "verbalizer.checkpoint_every_n_tokens",
    "verbalizer.lora.r",
    "reconstructor.lora.r",
    "verbalizer.shortest_prefix",
    "fsdp.shard_ranks",
    "rollouts.at_once",
)
POSITIVE_OR_ALL = ("activation_dumper.num_samples", "activation_dumper.val_num_samples", "evaluation.num_samples", "evaluation.search_rows")
NOT_NEGATIVE = (
    "loader_workers",
    "layer_l",
    "grad_clip",
    "weight_decay",
    "gumbel_noise",
    "rollouts.norm_anchor",
    "activation_dumper.min_pos",
    "dataset.min_words",
    "validation.num_examples",
    "fsdp.gather_gb",
    "stall_seconds",
    "evaluation.bootstrap",
    "evaluation.examples",
    "evaluation.report_documents",
)
DURATIONS = (
    "lr_scheduler.warmup_steps",
    "validation.interval",
    "checkpoint.save_interval",
    "checkpoint.keep_every",
    "log_interval",
    "max_train_steps",
    "early_termination.steps",
)
_LONGEST_NAME = 200  # of a run's folder; 255 is what file systems take, and trials and unfinished files add to it
_LARGEST = 1e150  # of a schedule's ends: differences and ratios of two are still finite
ANY_SIGN = ("entropy_weight",)  # of the weights; a bonus, or a price


def validate(config: Config) -> None:
    """Refuse values that cannot work, alone or together, before anything is loaded.

    Raises:
        ConfigError: naming the key and what it may be.
    """
    _check_each(config, "")
    _check_numbers(config)
    for key in DURATIONS:
        _check_duration(key, _get(config, key))
    _check_duration("num_train_epochs", duration_text(config.num_train_epochs, "e") if config.num_train_epochs > 0 else None)
    parts = (config.run_name or "").split("/")
    _require(
        max(len(part.encode()) for part in parts) <= _LONGEST_NAME,
        f"run_name={config.run_name} is too long for a folder: at most {_LONGEST_NAME} bytes",
    )
    for key, schedule in schedules(config):
        _check_schedule(key, schedule)
    _check_loss(config)
    _check_text(config)
    _check_rollouts(config)
    _check_data(config)
    _check_engine(config)


def schedules(node: Any, prefix: str = "") -> Iterator[tuple[str, Schedule]]:
    """Every schedule of a configuration, by its dotted key."""
    fields = node.items() if isinstance(node, dict) else ((f.name, getattr(node, f.name)) for f in dataclasses.fields(node))
    for name, value in fields:
        if isinstance(value, Schedule):
            yield f"{prefix}{name}", value
        elif dataclasses.is_dataclass(value) or isinstance(value, dict):
            yield from schedules(value, f"{prefix}{name}.")


def _check_each(node: Any, prefix: str) -> None:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            _check_each(value, f"{prefix}{f.name}.")
        elif value is None and f.default is None:
            continue
        elif f.metadata["choices"] and value not in f.metadata["choices"]:
            raise ConfigError(f"{prefix}{f.name}={value} must be one of: {', '.join(f.metadata['choices'])}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{f.name}={value} must be a finite number")
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            raise ConfigError(f"{prefix}{f.name}={value} must be less than 2**63, so that it fits 64 bits")
        elif isinstance(value, list) and (wrong := [each for each in value if not _is_element(each, str(f.type))]):
            raise ConfigError(f"{prefix}{f.name}={value!a} must hold {_ELEMENTS[str(f.type)][0]}, not {wrong[0]!a}")
        elif any(isinstance(text, str) and not _is_plain(text) for text in (value if isinstance(value, list) else [value])):
            raise ConfigError(f"{prefix}{f.name}={value!a} holds a null character or bytes that are no UTF-8")


_ELEMENTS: dict[str, tuple[str, tuple[type, ...]]] = {
    "list[int]": ("whole numbers", (int,)),
    "list[float]": ("numbers", (int, float)),
    "list[str]": ("texts", (str,)),
}
"""What a list of a type holds."""


def _is_element(value: Any, of: str) -> bool:
    return of not in _ELEMENTS or (isinstance(value, _ELEMENTS[of][1]) and not isinstance(value, bool))


def _is_plain(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _check_numbers(config: Config) -> None:
    for key in POSITIVE:
        _require(_get(config, key) > 0, f"{key}={_get(config, key)} must be greater than 0")
    for key in POSITIVE_OR_NULL:
        _require(_get(config, key) is None or _get(config, key) > 0, f"{key}={_get(config, key)} must be greater than 0, or null")
    for key in POSITIVE_OR_ALL:
        _require(_get(config, key) == -1 or _get(config, key) > 0, f"{key}={_get(config, key)} must be -1 (all) or greater than 0")
    for key in NOT_NEGATIVE:
        _require(_get(config, key) >= 0, f"{key}={_get(config, key)} must not be negative")
    _require(len(config.betas) == 2 and all(0 <= b < 1 for b in config.betas), f"betas={config.betas} must be two numbers in [0, 1)")
    for key in ("lora.dropout", "verbalizer.lora.dropout", "reconstructor.lora.dropout"):
        _require(0 <= (_get(config, key) or 0) < 1, f"{key}={_get(config, key)} must lie in [0, 1)")
    _require(0 < config.dataset.val_fraction < 1, f"dataset.val_fraction={config.dataset.val_fraction} must lie between 0 and 1")
    _require(
        config.max_train_steps is not None or config.num_train_epochs > 0,
        "num_train_epochs must be greater than 0 when max_train_steps is null",
    )


def _check_schedule(key: str, schedule: Schedule) -> None:
    _check_duration(f"{key}.constant_steps_before_decay", schedule.constant_steps_before_decay)
    if str(schedule.num_steps) != "-1":
        _check_duration(f"{key}.num_steps", schedule.num_steps)
    least = min(schedule.ends)
    _require(all(abs(end) <= _LARGEST for end in schedule.ends), f"{key}: {schedule.ends} must be finite numbers up to {_LARGEST:g}")
    _require(
        schedule.type != "exponential" or least * _LARGEST >= 1, f"{key}: an exponential schedule needs ends greater than 0, not {least}"
    )
    _require(key in ANY_SIGN or least >= 0, f"{key}={least} must not be negative")


def _check_loss(config: Config) -> None:
    weights = [config.mse_weight, config.kl_base_weight, config.lm_base_weight, config.entropy_weight]
    weights += [config.tail_say_weight, config.tail_read_weight, *config.terms.values()]
    _require(any(weights), "every loss weight is 0; set mse_weight, kl_base_weight, lm_base_weight, tail_say_weight or tail_read_weight")
    _require(
        config.reference.estimator != "k1",
        "reference.estimator=k1 cannot train: the gradient of the mean of d is zero in expectation; take k2 or k3",
    )
    _require(config.reference.clamp > 0, f"reference.clamp={config.reference.clamp} must be greater than 0")
    least = min(config.gumbel_tau_schedule.ends)
    _require(least > 0, f"gumbel_tau_schedule: tau must be greater than 0, not {least}")
    _require(
        not config.kl_base_weight or config.batch_size % 2 == 0,
        "kl_base_weight needs an even batch_size: each sample is paired with another of the batch",
    )


def _check_text(config: Config) -> None:
    options, prefixes = config.verbalizer, config.evaluation.prefixes
    _require(options.prompt.count("<act>") == 1, f"verbalizer.prompt={options.prompt!r} must hold the slot <act> exactly once")
    _require(
        options.inject_norm is None or (options.inject == "embedding" and options.inject_norm > 0),
        f"verbalizer.inject_norm={options.inject_norm} must be greater than 0 and needs verbalizer.inject=embedding",
    )
    _check_given(config)
    _require(options.tag is None or options.tag.isidentifier(), f"verbalizer.tag={options.tag} must be one word, e.g. explanation")
    _require(options.tag is None or options.end_token is not None, "verbalizer.tag needs texts that end; set verbalizer.end_token=eos")
    _require(
        options.shortest_prefix is None or options.shortest_prefix <= config.t_text,
        f"verbalizer.shortest_prefix={options.shortest_prefix} must not be more than t_text={config.t_text}",
    )
    _require(
        all(0 < count <= config.t_text for count in prefixes),
        f"evaluation.prefixes={prefixes} must lie between 1 and t_text={config.t_text}",
    )


def _check_given(config: Config) -> None:
    asked = [name for name in ("say", "read") if config.terms.get(name)]
    _require(
        not asked or config.given.path is not None, f"terms.{asked[0] if asked else ''} needs given texts; set given.path to a file of them"
    )
    _require(
        config.given.path is None or config.tail_order == "forward",
        "given.path needs tail_order=forward: a given text is read in the order in which it is said",
    )
    _require(config.given.path is None or not config.mix, "given.path cannot be joined to a mixture; leave mix empty")


def _check_rollouts(config: Config) -> None:
    options, reward = config.rollouts, config.reward
    for key, share in (("rollouts.top_p", options.top_p), ("rollouts.read_share", options.read_share)):
        _require(0 < share <= 1, f"{key}={share} must lie in (0, 1]")
    if any(config.terms.get(name) for name in ("policy", "imitate")):
        earned = (reward.direction, reward.mse, reward.log_mse, reward.kl, reward.language)
        _require(
            any(earned), "every weight of the reward is 0; set reward.direction, reward.mse, reward.log_mse, reward.kl or reward.language"
        )
    if config.terms.get("policy"):
        _require(options.draws > 1, "terms.policy compares the texts of an activation; set rollouts.draws=2 or more")
        own = config.verbalizer.lora.dropout
        dropout = config.lora.dropout if own is None else own
        _require(dropout == 0, "terms.policy must score what was sampled; set lora.dropout=0 (or verbalizer.lora.dropout=0)")


def _check_data(config: Config) -> None:
    dump = config.activation_dumper
    _require(min(dump.layers, default=0) >= 0, f"activation_dumper.layers={dump.layers} must not hold a negative block; the first is 0")
    _require(
        dump.min_pos < dump.seq_len,
        f"activation_dumper.min_pos={dump.min_pos} leaves no position in sequences of activation_dumper.seq_len={dump.seq_len}",
    )


def _check_engine(config: Config) -> None:
    _require(config.fsdp.tensor_ranks == 1 or config.engine == "fsdp", "fsdp.tensor_ranks needs engine=fsdp")
    _require(config.fsdp.tensor_ranks == 1 or not config.compile, "fsdp.tensor_ranks cannot be compiled; set compile=false")
    _require(config.engine == "auto" or config.deepspeed is None, "engine=fsdp needs no deepspeed file; leave one of the two out")


def _check_duration(key: str, value: str | None) -> None:
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


def _get(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = getattr(node, part)
    return node
