"""Every setting of megalens, typed and documented; YAML files and ``key=value`` arguments are merged into it.

``conf/config.yaml`` is printed from this file by ``python -m megalens.config``; a default stands nowhere else.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting is wrong. The message is one line for the person at the keyboard, and names the mend."""


def setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A documented dataclass field; a mutable default is copied for each instance."""
    metadata = {"help": text, "choices": choices}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Schedule:
    """A value over the training (:func:`megalens.schedule.schedule_value`)."""

    type: str = setting(
        "constant", "constant | linear | cosine | exponential | step", ("constant", "linear", "cosine", "exponential", "step")
    )
    value: float = setting(1.0, "the value of a constant schedule")
    start_value: float = setting(1.0, "where the others start")
    end_value: float = setting(1.0, "where they end")
    constant_steps_before_decay: str = setting("0s", "how long start_value is held first")
    num_steps: str = setting("-1", "how long the way takes (a step takes none); -1: until the end of the training")

    @property
    def ends(self) -> list[float]:
        """The values between which it lies."""
        return [self.value] if self.type == "constant" else [self.start_value, self.end_value]


@dataclass
class Weight(Schedule):
    """A schedule that may be written as a plain number: ``mse_weight: 0.5``. False where it is 0 throughout."""

    def __bool__(self) -> bool:
        return any(self.ends)


def as_weight(value: Any) -> Any:
    """A plain number as a weight; all else as it is."""
    return Weight(value=float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def weight(default: float, text: str) -> Any:
    """A documented field that is a number or a schedule."""
    return setting(Weight(value=default), text)


@dataclass
class WithWeights:
    """A section with weights: a number given for one is a constant schedule."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.type == "Weight":
                setattr(self, f.name, as_weight(getattr(self, f.name)))


@dataclass
class LrScheduler:
    """Learning rate over the training."""

    type: str = setting("constant", "constant | linear | cosine", ("constant", "linear", "cosine"))
    warmup_steps: str = setting("0s", "linear warm-up from warmup_start_factor to 1")
    warmup_start_factor: float = setting(0.01, "multiplier of learning_rate at step 0 of the warm-up")
    end_factor: float = setting(0.0, "multiplier of learning_rate at the end of linear and cosine")


@dataclass
class VerbalizerRates(WithWeights):
    """Factors on learning_rate for what is trained of the verbalizer."""

    projection: Weight = weight(1.0, "the projection of the activation")
    prompt: Weight = weight(1.0, "the prompt's embeddings")
    adapters: Weight = weight(1.0, "LoRA adapters")
    blocks: Weight = weight(1.0, "its own blocks and norm, in full mode")


@dataclass
class ReconstructorRates(WithWeights):
    """Factors on learning_rate for what is trained of the reconstructor."""

    head: Weight = weight(1.0, "the affine head")
    prompt: Weight = weight(1.0, "the prompt's and suffix's embeddings")
    adapters: Weight = weight(1.0, "LoRA adapters")
    blocks: Weight = weight(1.0, "its own blocks, in full mode")


@dataclass
class LrMultipliers:
    """Factors on learning_rate by group, each a number or a schedule; 0 freezes the group for as long as it is 0."""

    verbalizer: VerbalizerRates = setting(VerbalizerRates(), "the verbalizer's")
    reconstructor: ReconstructorRates = setting(ReconstructorRates(), "the reconstructor's")


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
    mode: str | None = setting(None, "frozen | lora | full; null: as train_mode", ("frozen", "lora", "full"))
    trainable_prompt: bool = setting(True, "train the prompt's embeddings")
    checkpoint_every_n_tokens: int | None = setting(
        None, "keep only every n-th token's state of a decode and compute the rest again in the backward (less memory, more time)"
    )


@dataclass
class Reconstructor:
    """Text to activation."""

    prompt: str = setting("The text ends with:", "what stands before the explanation")
    suffix: str = setting("", "what stands behind it; the last position is read")
    mode: str | None = setting(None, "frozen | lora | full; null: as train_mode", ("frozen", "lora", "full"))
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
    bootstrap: int = setting(1000, "resamples of documents for the 95 % intervals; 0: no intervals")
    search: str = setting("greedy", "how explanations are chosen: greedy | best_of:K, of K the one that is rebuilt best")
    examples: int = setting(12, "held-out examples printed")
    report_documents: int = setting(8, "documents coloured token by token in report.html")


@dataclass
class Config(WithWeights):
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
    lr_multipliers: LrMultipliers = setting(
        LrMultipliers(), "factors on learning_rate by group: numbers, or schedules as of gumbel_tau_schedule (0: frozen for the time)"
    )
    batch_size: int = setting(64, "samples per micro-step over all ranks")
    gradient_accumulation_steps: int = setting(1, "micro-steps per optimizer step")
    num_train_epochs: float = setting(1.0, "length of the training when max_train_steps is null")
    max_train_steps: str | None = setting(None, 'length of the training as a duration, e.g. "500s", "100os" or "2e"')

    gumbel_tau_schedule: Schedule = setting(Schedule(type="linear", start_value=1.0, end_value=0.5), "temperature of the Gumbel-softmax")
    gumbel_noise: float = setting(1.0, "scale of the Gumbel noise; 1: samples of the verbalizer's distribution, 0: greedy")
    text_gradient: bool = setting(True, "let the reconstruction's gradient through the text into the verbalizer")
    mse_weight: Weight = weight(1.0, "|a - a_hat|^2 / |a|^2 of the round trip")
    kl_base_weight: Weight = weight(0.0, "KL(M(a) || M(a_hat + delta)) of the subject's next token")
    lm_base_weight: Weight = weight(0.0, "KL(verbalizer || subject) over the explanation, times alpha")
    alpha_schedule: Schedule = setting(Schedule(value=0.1), "alpha over the training")
    entropy_weight: Weight = weight(0.0, "entropy of the verbalizer's tokens (a bonus)")
    tail_say_weight: Weight = weight(0.0, "warm start: cross-entropy of the verbalizer on the context's tail")
    tail_read_weight: Weight = weight(0.0, "warm start: mse of the reconstructor reading the context's tail")
    terms: dict[str, Weight] = setting({}, "weights of further terms of the objective, by name (docs/extending.md)")
    tail_order: str = setting(
        "last_first",
        "order of an explanation: forward, or last_first (the token at P is said first, then what leads up to it; it is read last)",
        ("forward", "last_first"),
    )

    validation: Validation = setting(Validation(), "held-out measurements while training")
    checkpoint: Checkpoint = setting(Checkpoint(), "saving and resuming")
    early_termination: EarlyTermination = setting(EarlyTermination(), "ending before the end")
    log_interval: str = setting("10s", "how often training metrics are logged")
    compile: bool = setting(False, "run the decoder blocks through torch.compile (minutes at the start; docs/step.md says what it brings)")
    detect_anomaly: bool = setting(False, "check hidden states for NaN and infinity and name the sample and token")
    wandb: Wandb = setting(Wandb(), "Weights & Biases")
    evaluation: Evaluation = setting(Evaluation(), "tools/eval.py")
    engine: str = setting("auto", "auto (deepspeed where a file is given, else local) | fsdp (FSDP2, under torchrun)", ("auto", "fsdp"))
    deepspeed: str | None = setting(None, "a DeepSpeed configuration file (also --deepspeed FILE); null: no DeepSpeed")
    fsdp: Fsdp = setting(Fsdp(), "engine=fsdp")
    stall_seconds: float = setting(
        1800.0, "a training without a step (or validation, or save) for so long is ended, and tells where each rank stands; 0: never"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.terms = {name: as_weight(value) for name, value in self.terms.items()}

    def mode_of(self, role: str) -> str:
        """What of the base is trained for a role (``verbalizer`` or ``reconstructor``): its own ``mode``, or else ``train_mode``."""
        return getattr(self, role).mode or self.train_mode

    @property
    def run_dir(self) -> Path:
        """``outputs/<run>``: checkpoints, report and logs of this run."""
        return Path(self.output_dir) / (self.run_name or "run")

    @property
    def model_label(self) -> str:
        """The model's name as a folder name."""
        return _folder_name(self.model_name)

    @property
    def tokenizer_label(self) -> str:
        """The tokenizer's name as a folder name."""
        return _folder_name(self.tokenizer_name or self.model_name)

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
        """The pretokenized corpus: the tokens of one dataset and one tokenizer."""
        return Path(self.pretokenize.root) / self.dataset_label / self.tokenizer_label


def _folder_name(model: str) -> str:
    """A hub name without its slash, or the last part of a path."""
    is_hub_name = model.count("/") <= 1 and not os.path.isdir(model)
    return model.replace("/", "__") if is_hub_name else os.path.basename(os.path.abspath(model))
