"""Every setting of megalens, typed and documented; YAML files and ``key=value`` arguments are merged into it.

``conf/config.yaml`` is printed from this room by ``python -m megalens.config``; a default stands nowhere else.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from megalens.config.fields import Schedule, Weight, WithWeights, as_weight, setting, weight
from megalens.config.method import Gates, Policy, Reward, Rollouts
from megalens.config.roles import Lora, LrMultipliers, LrScheduler, Reconstructor, Reference, Verbalizer
from megalens.config.running import Checkpoint, EarlyTermination, Evaluation, Fsdp, Validation, Wandb
from megalens.config.text import ActivationDumper, Dataset, Given, Pretokenize


@dataclass
class Config(WithWeights):
    """One training, from the text to the lens."""

    model_name: str = setting("data/models/SmolLM2-135M-Instruct", "the subject: a local folder or a Hugging Face model")
    revision: str | None = setting(None, "branch, tag or commit of a Hugging Face model and its tokenizer; null: its main branch")
    tokenizer_name: str | None = setting(None, "null: the subject's own")
    trust_remote_code: bool = setting(False, "run code that comes with the model; only for models you trust")
    layer_l: int = setting(19, "activations are read after this decoder block (0-based)")
    t_text: int = setting(8, "tokens of a text; the most, where verbalizer.end_token is set")
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
    given: Given = setting(Given(), "texts that are given, for terms.say and terms.read")
    mix: list[str] = setting([], "train on several dumps of one layer: [FOLDER=SHARE, ...]; empty: on this configuration's own")
    loader_workers: int = setting(0, "processes per rank that read batches ahead; 0: a thread")

    train_mode: str = setting(
        "lora", "what of the base is trained: frozen (projections and prompts only) | lora | full", ("frozen", "lora", "full")
    )
    lora: Lora = setting(Lora(), "adapters")
    verbalizer: Verbalizer = setting(Verbalizer(), "activation to text")
    reconstructor: Reconstructor = setting(Reconstructor(), "text to activation")
    reference: Reference = setting(Reference(), "terms.reference_kl")
    init_from: str | None = setting(
        None, "where the lens starts: a checkpoint folder, or the config file of the run whose best one it is; null: fresh"
    )

    optimizer: str = setting("adamw", "adamw | sgd (without momentum)", ("adamw", "sgd"))
    learning_rate: float = setting(3e-4, "the optimizer's learning rate")
    weight_decay: float = setting(0.0, "its weight decay")
    betas: list[float] = setting([0.9, 0.95], "AdamW's betas")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    grad_limit: float = setting(
        1e8, "a step whose gradient norm (before clipping) is above this or not finite is skipped; 50 in a row end the training"
    )
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
    rollouts: Rollouts = setting(Rollouts(), "sampled texts (docs/rollouts.md)")
    reward: Reward = setting(Reward(), "what a sampled text is worth")
    policy: Policy = setting(Policy(), "the policy's gradient")
    gates: Gates = setting(Gates(), "warnings of a training on rollouts")
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

    def lora_of(self, role: str) -> Lora:
        """The adapters of a role (``verbalizer`` or ``reconstructor``): ``lora`` with what the role's own section changes."""
        own = {key: value for key, value in dataclasses.asdict(getattr(self, role).lora).items() if value not in (None, [])}
        return dataclasses.replace(self.lora, **own)

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
