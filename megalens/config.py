"""Every setting of megalens, typed and documented; YAML files and ``key=value`` arguments are merged into it.

``conf/config.yaml`` is printed from this file by ``python -m megalens.config``; a default stands nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalens.schedule import parse_duration


class ConfigError(ValueError):
    """A setting is wrong. The message is one line for the person at the keyboard, and names the mend."""


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A documented dataclass field; a mutable default is copied for each instance."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(
            default_factory=lambda: type(default)(default) if isinstance(default, (list, dict)) else dataclasses.replace(default),
            metadata=metadata,
        )
    return field(default=default, metadata=metadata)


@dataclass
class Schedule:
    """A value over the training (:func:`megalens.schedule.schedule_value`)."""

    type: str = setting("constant", "constant | linear | cosine | exponential", ("constant", "linear", "cosine", "exponential"))
    value: float = setting(1.0, "the value of a constant schedule")
    start_value: float = setting(1.0, "where linear, cosine and exponential start")
    end_value: float = setting(1.0, "where they end")
    constant_steps_before_decay: str = setting("0s", "how long start_value is held first")
    num_steps: str = setting("-1", "how long the way takes; -1: until the end of the training")


@dataclass
class LrScheduler:
    """Learning rate over the training."""

    type: str = setting("constant", "constant | linear | cosine", ("constant", "linear", "cosine"))
    warmup_steps: str = setting("0s", "linear warm-up from warmup_start_factor to 1")
    warmup_start_factor: float = setting(0.01, "multiplier of learning_rate at step 0 of the warm-up")
    end_factor: float = setting(0.0, "multiplier of learning_rate at the end of linear and cosine")


@dataclass
class LrMultipliers:
    """Per-group factors on learning_rate."""

    projection_layers: float = setting(1.0, "the verbalizer's projection and the reconstructor's head")
    prompts: float = setting(1.0, "the trainable prompt embeddings")
    base_model: float = setting(1.0, "adapters, or the model's own weights in full mode")


@dataclass
class Dataset:
    """Where the text comes from."""

    name: str = setting(
        "wiki-leads",
        "wiki-leads (packaged corpus), a Hugging Face dataset, or a local .txt/.json/.jsonl/.parquet file or folder, also with .zst behind",
    )
    config_name: str | None = setting(None, "the hub dataset's configuration")
    split: str = setting("train", "the split to read")
    val_split: str | None = setting(None, "a split for validation; null: val_fraction of the documents of split")
    text_column: str = setting("text", "the column that holds the text")
    val_fraction: float = setting(0.1, "share of documents held out when val_split is null")
    split_seed: int = setting(42, "seed of that division by document, and of the positions and row order of the dump")
    max_documents: int | None = setting(None, "read only so many documents; null: all")
    min_words: int = setting(12, "documents with fewer words are dropped")


@dataclass
class Pretokenize:
    """Tokenizing once, before everything else."""

    root: str = setting("data/pretokenized", "folder of the pretokenized corpora")
    num_proc: int | None = setting(None, "processes; null: one per core")
    streaming: bool = setting(False, "read the text as a stream, never kept on disk but as tokens; always so for .zst files")


@dataclass
class ActivationDumper:
    """Reading activations out of the subject into shards."""

    root: str = setting("data/activations", "folder of the dumps: <root>/<model>/layer_<L>/<dataset>_<split>/")
    seq_len: int = setting(64, "tokens of context read per document")
    min_pos: int = setting(8, "earliest token position sampled (0-based)")
    vectors_per_sequence: int = setting(1, "positions sampled per document (fewer where it is shorter)")
    num_samples: int = setting(-1, "rows of the train split; -1: all there are")
    val_num_samples: int = setting(-1, "rows of the validation split; -1: all there are")
    batch_size: int = setting(32, "sequences per forward pass, per rank")
    rows_per_shard: int = setting(16384, "rows of a shard file")
    rows_per_batch: int = setting(1024, "rows of a compressed record batch")
    num_tokens: int = setting(-1, "context tokens that the train split's documents may have in all; -1: no limit")
    layers: list[int] = setting([], "blocks dumped in one pass, a folder each; empty: layer_l alone")
    encoding: str = setting(
        "bf16_planes",
        "bf16 | bf16_planes (high and low bytes apart; compresses better) | int8 (lossy, about 0.9 bytes a value) | fp32",
        ("bf16", "bf16_planes", "int8", "fp32"),
    )


@dataclass
class Lora:
    """LoRA adapters (train_mode lora)."""

    r: int = setting(64, "rank")
    alpha: float = setting(64.0, "scale; the update is alpha / r times B A")
    dropout: float = setting(0.0, "dropout on the adapter's input")


@dataclass
class Verbalizer:
    """Activation to text."""

    prompt: str = setting("The text<act> ends with:", "the prompt; <act> is the slot of the activation")
    plain_prompt: str = setting("The text ends with:", "the same prompt without an activation, for the subject's side of the LM term")
    inject: str = setting(
        "block",
        "where the activation enters: block (replaces the slot's residual after block layer_l) or embedding",
        ("block", "embedding"),
    )
    mode: str = setting("${train_mode}", "frozen | lora | full; follows train_mode unless set", ("frozen", "lora", "full"))
    trainable_prompt: bool = setting(True, "train the prompt's embeddings")
    checkpoint_every_n_tokens: int | None = setting(
        None, "keep only every n-th token's state of a decode and compute the rest again in the backward (less memory, more time)"
    )


@dataclass
class Reconstructor:
    """Text to activation."""

    prompt: str = setting("The text ends with:", "what stands before the explanation")
    suffix: str = setting("", "what stands behind it; the last position is read")
    mode: str = setting("${train_mode}", "frozen | lora | full; follows train_mode unless set", ("frozen", "lora", "full"))
    trainable_prompt: bool = setting(True, "train the prompt's and suffix's embeddings")


@dataclass
class Validation:
    """Measuring on held-out rows while training."""

    interval: str = setting("1e", "how often")
    num_samples: int = setting(256, "held-out rows used")
    num_examples: int = setting(8, "sample explanations logged each time")


@dataclass
class Checkpoint:
    """Saving and resuming."""

    save_interval: str = setting("1e", "how often the last checkpoint is written")
    track_best_n: int = setting(1, "how many of the best checkpoints are kept")
    keep_every: str | None = setting(None, "a checkpoint is saved, and kept for good, at each such interval; null: none")
    best_metric: str = setting("val/fve_nrm", "what best means; a metric of the validation")
    best_mode: str = setting("max", "max | min", ("max", "min"))
    resume: bool = setting(True, "go on from the run's last checkpoint when there is one")


@dataclass
class EarlyTermination:
    """Ending a training before its time, as sweeps do with trials that promise little."""

    steps: str | None = setting(
        None, "end here, a duration; schedules keep the full length, and the same run can go on later. null: at the end"
    )


@dataclass
class Fsdp:
    """FSDP2 (engine fsdp)."""

    shard_ranks: int | None = setting(
        None, "ranks that share one copy of the model, e.g. those of a node (hybrid sharding: whole copies between nodes); null: all ranks"
    )
    tensor_ranks: int = setting(
        1, "ranks, of those, that slice the matrices of every block among them and work on the same samples (tensor parallelism; in a node)"
    )
    offload: bool = setting(False, "keep parameters, gradients and optimizer state on the CPU")
    gather_gb: float = setting(0.0, "GPU memory for blocks that stay gathered through a micro-step, not anew for every decoded token")


@dataclass
class Wandb:
    """Weights & Biases."""

    project: str = setting("megalens", "project")
    entity: str | None = setting(None, "user or team")
    mode: str = setting(
        "offline", "offline | online | disabled; under `wandb agent` online, unless WANDB_MODE is set", ("offline", "online", "disabled")
    )


@dataclass
class Evaluation:
    """Measuring a finished lens (tools/eval.py)."""

    num_samples: int = setting(-1, "held-out rows; -1: all")
    batch_size: int = setting(64, "rows at a time")
    bootstrap: int = setting(1000, "resamples of documents for the 95 % intervals")
    examples: int = setting(12, "held-out examples printed")
    report_documents: int = setting(8, "documents coloured token by token in report.html")


@dataclass
class Config:
    """One training, from the text to the lens."""

    model_name: str = setting("data/models/SmolLM2-135M-Instruct", "the subject: a local folder or a Hugging Face model")
    tokenizer_name: str | None = setting(None, "null: the subject's own")
    trust_remote_code: bool = setting(False, "run code that comes with the model; only for models you trust")
    layer_l: int = setting(19, "activations are read after this decoder block (0-based)")
    t_text: int = setting(8, "tokens of an explanation")
    run_name: str | None = setting(None, "folder under outputs/; null: the config file's name")
    output_dir: str = setting("outputs", "where runs are kept")
    seed: int = setting(0, "seed of sample order, initialisation and Gumbel noise")
    device: str = setting("auto", "auto (a GPU where there is one) | cpu | cuda", ("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto",
        "arithmetic: bf16 | fp32 | auto (bf16 where the processor has it, else fp32); trained weights keep an fp32 master",
        ("auto", "bf16", "fp32"),
    )
    force_redump: bool = setting(False, "make pretokenized text and dump anew (tools/run_pipeline.py, tools/dump_acts.py)")

    dataset: Dataset = setting(Dataset(), "text")
    pretokenize: Pretokenize = setting(Pretokenize(), "tokenizing")
    activation_dumper: ActivationDumper = setting(ActivationDumper(), "activations")

    on_the_fly: bool = setting(
        False, "read the training's activations from the subject as it goes (free with kl_base_weight); only the val split is dumped"
    )
    mix: list[str] = setting([], "train on several dumps of one layer: [FOLDER=SHARE, ...]; empty: on this configuration's own")
    loader_workers: int = setting(0, "processes per rank that read batches ahead; 0: a thread")

    train_mode: str = setting(
        "lora", "what of the base is trained: frozen (projections and prompts only) | lora | full", ("frozen", "lora", "full")
    )
    lora: Lora = setting(Lora(), "adapters")
    verbalizer: Verbalizer = setting(Verbalizer(), "activation to text")
    reconstructor: Reconstructor = setting(Reconstructor(), "text to activation")
    init_from: str | None = setting(
        None, "where the lens starts: a checkpoint folder, or the config file of the run whose best one it is; null: fresh"
    )

    optimizer: str = setting("adamw", "adamw | sgd (without momentum)", ("adamw", "sgd"))
    learning_rate: float = setting(3e-4, "the optimizer's learning rate")
    weight_decay: float = setting(0.0, "its weight decay")
    betas: list[float] = setting([0.9, 0.95], "AdamW's betas")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    lr_scheduler: LrScheduler = setting(LrScheduler(), "learning rate over the training")
    custom_lr_multipliers: LrMultipliers = setting(LrMultipliers(), "per parameter group")
    batch_size: int = setting(64, "samples per micro-step over all ranks")
    gradient_accumulation_steps: int = setting(1, "micro-steps per optimizer step")
    num_train_epochs: float = setting(1.0, "length of the training when max_train_steps is null")
    max_train_steps: str | None = setting(None, 'length of the training as a duration, e.g. "500s", "100os" or "2e"')

    gumbel_tau_schedule: Schedule = setting(Schedule(type="linear", start_value=1.0, end_value=0.5), "temperature of the Gumbel-softmax")
    gumbel_noise: float = setting(1.0, "scale of the Gumbel noise; 1: samples of the verbalizer's distribution, 0: greedy")
    text_gradient: bool = setting(True, "let the reconstruction's gradient through the text into the verbalizer")
    mse_weight: float = setting(1.0, "|a - a_hat|^2 / |a|^2 of the round trip")
    kl_base_weight: float = setting(0.0, "KL(M(a) || M(a_hat + delta)) of the subject's next token")
    lm_base_weight: float = setting(0.0, "KL(verbalizer || subject) over the explanation, times alpha")
    alpha_schedule: Schedule = setting(Schedule(value=0.1), "alpha over the training")
    entropy_weight: float = setting(0.0, "entropy of the verbalizer's tokens (a bonus)")
    tail_say_weight: float = setting(0.0, "warm start: cross-entropy of the verbalizer on the context's tail")
    tail_read_weight: float = setting(0.0, "warm start: mse of the reconstructor reading the context's tail")
    tail_order: str = setting(
        "last_first",
        "order of an explanation: forward, or last_first (the token at P is said first, then what leads up to it; it is read last)",
        ("forward", "last_first"),
    )

    validation: Validation = setting(Validation(), "held-out measurements while training")
    checkpoint: Checkpoint = setting(Checkpoint(), "saving and resuming")
    early_termination: EarlyTermination = setting(EarlyTermination(), "ending before the end")
    log_interval: str = setting("10s", "how often training metrics are logged")
    compile: bool = setting(
        False, "run the decoder blocks through torch.compile (minutes at the start; docs/kernels.md says what it brings)"
    )
    detect_anomaly: bool = setting(False, "check hidden states for NaN and infinity and name the sample and token")
    wandb: Wandb = setting(Wandb(), "Weights & Biases")
    evaluation: Evaluation = setting(Evaluation(), "tools/eval.py")
    engine: str = setting("auto", "auto (deepspeed where a file is given, else local) | fsdp (FSDP2, under torchrun)", ("auto", "fsdp"))
    deepspeed: str | None = setting(None, "a DeepSpeed configuration file (also --deepspeed FILE); null: no DeepSpeed")
    fsdp: Fsdp = setting(Fsdp(), "engine=fsdp")
    stall_seconds: float = setting(
        1800.0, "a training without a step (or validation, or save) for so long is ended, and tells where each rank stands; 0: never"
    )

    @property
    def run_dir(self) -> Path:
        """``outputs/<run>``: checkpoints, report and logs of this run."""
        return Path(self.output_dir) / (self.run_name or "run")

    @property
    def model_label(self) -> str:
        """The model's name as a folder name."""
        is_hub_name = self.model_name.count("/") <= 1 and not os.path.isdir(self.model_name)
        return self.model_name.replace("/", "__") if is_hub_name else Path(self.model_name).name

    @property
    def dataset_label(self) -> str:
        """The dataset's name as a folder name."""
        path = Path(self.dataset.name.removesuffix(".zst"))
        is_local = Path(self.dataset.name).exists() or path.suffix in (".txt", ".json", ".jsonl", ".parquet")
        name = path.stem if is_local else self.dataset.name
        return "_".join(filter(None, [name.strip("/").replace("/", "__"), self.dataset.config_name]))

    def activation_dir(self, split: str) -> Path:
        """The dump of ``split`` (``train`` or ``val``)."""
        return Path(self.activation_dumper.root) / self.model_label / f"layer_{self.layer_l}" / f"{self.dataset_label}_{split}"

    @property
    def pretokenized_dir(self) -> Path:
        """The pretokenized corpus."""
        return Path(self.pretokenize.root) / self.dataset_label


# ---------------------------------------------------------------------------------------------------------- reading


def load_config(arguments: list[str]) -> Config:
    """Command-line arguments to a checked configuration.

    ``config=FILE`` names a YAML file (default: the built-in defaults); other ``key=value`` or ``--key=value`` arguments
    override it, the last one winning. ``--deepspeed FILE`` is taken as ``deepspeed=FILE``; ``--local_rank=N`` (from launchers) is ignored.

    Raises:
        ConfigError: unknown key, wrong type, empty value, missing file, or settings that contradict each other.
    """
    arguments = _normalise(arguments)
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("config=")]
    overrides = [a for a in arguments if not a.startswith("config=")]
    if len(files) > 1:
        raise ConfigError(f"config= is given {len(files)} times; give one file and put what is common in its defaults:")
    merged = OmegaConf.structured(Config)
    if files:
        if not files[0]:
            raise ConfigError("config= is empty; name a file, e.g. config=conf/demo.yaml")
        merged = _merge_file(merged, Path(files[0]), ())
        if merged.run_name is None:
            merged.run_name = Path(files[0]).stem
    for argument in overrides:
        merged = _merge_argument(merged, argument)
    return _finish(merged)


def config_from_dict(values: dict, arguments: Sequence[str] = ()) -> Config:
    """A checked configuration from a plain dictionary (as saved in a checkpoint), with ``key=value`` arguments merged into it."""
    merged = _merge(OmegaConf.structured(Config), values, "the saved configuration")
    for argument in _normalise(list(arguments)):
        merged = _merge_argument(merged, argument)
    return _finish(merged)


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML that ``config=`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _normalise(arguments: list[str]) -> list[str]:
    result, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--deepspeed":
            if not rest:
                raise ConfigError("--deepspeed wants a file, e.g. --deepspeed ds_configs/z3.json")
            argument = f"deepspeed={rest.pop(0)}"
        argument = argument.removeprefix("--")
        if argument.startswith(("local_rank=", "local-rank=")):
            continue
        if argument in _keys(Config):
            raise ConfigError(f"'{argument}' has no value; write {argument}=VALUE")
        if "=" not in argument:
            raise ConfigError(f"'{argument}' is no setting; write key=value" + _nearest(argument, ["config", *_keys(Config)]))
        result.append(argument)
    return result


def _merge_file(base, path: Path, seen: tuple[Path, ...]):
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its defaults lead back to itself")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    except OSError:  # what OmegaConf raises for a file that holds a single number
        raise ConfigError(f"{path} holds no key: value pairs") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no key: value pairs")
    parents = values.pop("defaults", None) or []
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: defaults: is a list of file names in the same folder without .yaml, e.g. defaults: [demo_warmstart]")
    for parent in parents:
        if parent != "_self_":
            base = _merge_file(base, path.parent / f"{parent}.yaml", (*seen, path.resolve()))
    return _merge(base, values, str(path))


def _merge_argument(base, argument: str):
    key, value = argument.split("=", 1)
    if value == "None":  # how W&B's agent writes a null
        argument, value = f"{key}=null", "null"
    if value == "":
        raise ConfigError(f"{key}= is empty; give it a value (in a sweep: does the parameter's name match a key of conf/config.yaml?)")
    _check_key(key, "the command line")
    kind = _keys(Config)[key]
    is_list = str(kind).startswith("list")
    if value != "null" and "str" in str(kind) and not is_list:  # text as it stands: 001, on and a: b are no numbers, truths or mappings
        return _merge(base, _nested(key, value), argument)
    try:
        return _merge(base, OmegaConf.to_container(OmegaConf.from_dotlist([argument])), argument)
    except yaml.YAMLError:
        raise ConfigError(f"{argument}: this is no {kind}") from None


def _merge(base, values: dict, where: str):
    for key, value in _flat(values).items():
        _check_key(key, where)
        _check_value(key, value, where)
    try:
        return OmegaConf.merge(base, OmegaConf.create(values))
    except OmegaConfBaseException as error:
        key = error.full_key if error.full_key and not where.startswith(f"{error.full_key}=") else ""
        raise ConfigError(": ".join(filter(None, [where, key, _line(error)]))) from None


def _check_value(key: str, value, where: str) -> None:
    """Refuse, in plainer words than OmegaConf's, a value where a section is meant, a null and a list of no list."""
    kind = _keys(Config)[key]
    if dataclasses.is_dataclass(kind) and not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} is a section; set its keys, e.g. {key}.{dataclasses.fields(kind)[0].name}=...")
    if value is None and not dataclasses.is_dataclass(kind) and "None" not in str(kind):
        raise ConfigError(f"{where}: {key} can not be null")
    if str(kind).startswith("list") and not isinstance(value, list):
        raise ConfigError(f"{where}: {key} is a list; write {key}=[a,b,...]")


def _check_key(key: str, where: str) -> None:
    known = _keys(Config)
    if key not in known:
        raise ConfigError(f"unknown key '{key}' in {where}" + _nearest(key, [k for k in known if not dataclasses.is_dataclass(known[k])]))


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; an empty section stays a section."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _nested(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@functools.cache
def _keys(cls, prefix: str = "") -> dict[str, Any]:
    """Every dotted key and its type; a section's type is its dataclass."""
    keys = {}
    for name, kind in get_type_hints(cls).items():
        keys[prefix + name] = kind.__name__ if kind in (bool, int, float, str) else kind
        if dataclasses.is_dataclass(kind):
            keys |= _keys(kind, f"{prefix}{name}.")
    return keys


def _nearest(key: str, known: Iterable[str]) -> str:
    """The known key meant: one of the same last part or initials (lr), of a close last part in the section, or of close spelling."""
    section, _, last = key.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in known}
    siblings = {leaf: name for name, leaf in leaves.items() if name.rpartition(".")[0] == section}
    near = [name for name, leaf in leaves.items() if last and last in (leaf, "".join(word[:1] for word in leaf.split("_")))]
    near += [siblings[leaf] for leaf in difflib.get_close_matches(last, siblings, 1, 0.5)]
    near += difflib.get_close_matches(key, leaves, 1, 0.6)
    return f"; did you mean '{near[0]}'?" if near else "; conf/config.yaml lists every key"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# --------------------------------------------------------------------------------------------------------- checking


def _finish(merged) -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_line(error)) from None
    validate(config)
    return config


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


# --------------------------------------------------------------------------------------------------------- printing


def documented_yaml() -> str:
    """``conf/config.yaml``: every key with its default and what it means."""
    head = [
        "# Every setting and its default. Printed by `python -m megalens.config`; change megalens/config.py, not this file.",
        "# An experiment names only what it changes, and its parents under defaults:.",
        "",
    ]
    return "\n".join(head + _document(Config(), "")) + "\n"


def _document(node, indent: str) -> list[str]:
    lines = []
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"{indent}{f.name}:  # {f.metadata['help']}", *_document(value, indent + "  "), ""]
        else:
            text = (
                OmegaConf.to_yaml(OmegaConf.create({f.name: value}), resolve=False).strip()
                if not isinstance(value, list)
                else f"{f.name}: {value}"
            )
            lines.append(f"{indent}{text}  # {f.metadata['help']}")
    return [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]


if __name__ == "__main__":
    print(documented_yaml(), end="")
