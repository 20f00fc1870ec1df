"""Settings of what is trained: the verbalizer, the reconstructor, their adapters and their learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from megalens.config.fields import Weight, WithWeights, setting, weight


@dataclass
class Lora:
    """LoRA adapters (train_mode lora)."""

    r: int = setting(64, "rank")
    alpha: float = setting(64.0, "scale; the update is alpha / r times B A, or alpha / sqrt(r) with rslora")
    rslora: bool = setting(False, "divide by sqrt(r): the update keeps its size as the rank grows (rank-stabilised LoRA)")
    dropout: float = setting(0.0, "dropout on the adapter's input")
    targets: list[str] = setting(
        [], "last parts of the names of the layers that are adapted, e.g. [q_proj,v_proj]; empty: every linear layer"
    )


@dataclass
class RoleLora:
    """What a role's adapters have other than ``lora`` says."""

    r: int | None = setting(None, "rank; null: as lora.r")
    alpha: float | None = setting(None, "scale; null: as lora.alpha")
    rslora: bool | None = setting(None, "alpha / sqrt(r); null: as lora.rslora")
    dropout: float | None = setting(None, "dropout; null: as lora.dropout")
    targets: list[str] = setting([], "layers; empty: as lora.targets")


@dataclass
class Verbalizer:
    """Activation to text."""

    prompt: str = setting("The text<act> ends with:", "the prompt; <act> is the slot of the activation")
    chat: bool = setting(False, "put the prompts through the tokenizer's chat template, as a user's message that is to be answered")
    marker: str | None = setting(
        None,
        "what stands in the slot when the prompt is tokenised, one token, e.g. ●; null: what is left and right of it is tokenised alone",
    )
    plain_prompt: str = setting("The text ends with:", "the same prompt without an activation, for the subject's side of the LM term")
    inject: str = setting(
        "block",
        "where the activation enters: block (replaces the slot's residual after block layer_l) or embedding",
        ("block", "embedding"),
    )
    inject_norm: float | None = setting(
        None, "with inject=embedding: the activation itself enters, rescaled to this norm; null: a trained projection of it"
    )
    end_token: str | None = setting(
        None, "what ends a text of at most t_text tokens: eos, or a string that is one token; null: every text has exactly t_text tokens"
    )
    tag: str | None = setting(None, "the explanation is what stands between <tag> and </tag> in a text, e.g. explanation; null: all of it")
    shortest_prefix: int | None = setting(
        None, "rollouts are judged by their first tokens only, from so many to t_text, drawn once per activation and step; null: by all"
    )
    mode: str | None = setting(None, "frozen | lora | full; null: as train_mode", ("frozen", "lora", "full"))
    lora: RoleLora = setting(RoleLora(), "its adapters, where they differ from lora")
    trainable_prompt: bool = setting(True, "train the prompt's embeddings")
    checkpoint_every_n_tokens: int | None = setting(
        None, "keep only every n-th token's state of a decode and compute the rest again in the backward (less memory, more time)"
    )


@dataclass
class Reconstructor:
    """Text to activation."""

    prompt: str = setting("The text ends with:", "what stands before the explanation")
    suffix: str = setting("", "what stands behind it; the last position is read")
    head: str = setting(
        "affine",
        "affine (in standardised dimensions, with an offset) | linear (a matrix alone, as other tools read it); both start as the identity",
        ("affine", "linear"),
    )
    mode: str | None = setting(None, "frozen | lora | full; null: as train_mode", ("frozen", "lora", "full"))
    lora: RoleLora = setting(RoleLora(), "its adapters, where they differ from lora")
    trainable_prompt: bool = setting(True, "train the prompt's and suffix's embeddings")


@dataclass
class Reference:
    """The verbalizer as it was when the training began, which terms.reference_kl stays near."""

    estimator: str = setting(
        "k2",
        "of the KL, from sampled tokens, d = log-prob - reference's: k2 (d^2 / 2; the gradient of KL(verbalizer || reference)) | "
        "k3 (exp(-d) - 1 + d; that of KL(reference || verbalizer))",
        ("k1", "k2", "k3"),
    )
    clamp: float = setting(12.0, "k3: where -d is greater its gradient grows no more")


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
class LrScheduler:
    """Learning rate over the training."""

    type: str = setting("constant", "constant | linear | cosine", ("constant", "linear", "cosine"))
    warmup_steps: str = setting("0s", "linear warm-up from warmup_start_factor to 1")
    warmup_start_factor: float = setting(0.01, "multiplier of learning_rate at step 0 of the warm-up")
    end_factor: float = setting(0.0, "multiplier of learning_rate at the end of linear and cosine")
