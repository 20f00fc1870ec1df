"""Settings of how texts are sampled and what is learnt from them: rollouts, their reward, the policy's gradient, the gates."""

from __future__ import annotations

from dataclasses import dataclass

from megalens.config.fields import Weight, WithWeights, setting, weight


@dataclass
class Rollouts:
    """Texts sampled from the verbalizer, for the terms policy, imitate and rollout_read."""

    draws: int = setting(8, "texts of each activation")
    temperature: float = setting(1.0, "divides the logits")
    top_p: float = setting(1.0, "sample from the likeliest tokens that hold this share of the probability; 1: from all")
    at_once: int | None = setting(None, "texts sampled together, per rank; null: all of an optimizer step (fewest gathers)")
    inner_steps: int = setting(1, "optimizer steps on the same texts; above 1 the policy's ratio is clipped (policy.clip)")
    floor: float = setting(-2.0, "reward of a text that is unfinished or says nothing")
    imitate: str = setting("best", "what imitate says: best (of the draws) | weighted (all, by softmax of reward)", ("best", "weighted"))
    imitate_temperature: float = setting(1.0, "of that softmax")
    read_share: float = setting(1.0, "share of an activation's texts that rollout_read learns from")
    read_loss: str = setting(
        "mse",
        "what rollout_read minimises: mse | direction (2 - 2 cos, and norm_anchor times the squared log of norms)",
        ("mse", "direction"),
    )
    norm_anchor: float = setting(0.1, "holds the rebuild's norm at the activation's where only the direction is trained")


@dataclass
class Reward(WithWeights):
    """What a text is worth: a sum of these, each times its weight, a number or a schedule."""

    direction: Weight = weight(1.0, "-(2 - 2 cos) of activation and rebuild")
    mse: Weight = weight(0.0, "-|a - a_hat|^2 / |a|^2")
    log_mse: Weight = weight(0.0, "-log of that")
    kl: Weight = weight(0.0, "-KL(M(a) || M(a_hat)) of the subject's next token")
    language: Weight = weight(0.0, "log-probability of the text under the subject on the plain prompt, per token")
    price: Weight = weight(0.0, "what each token of a text costs")


@dataclass
class Policy(WithWeights):
    """The policy's gradient (terms.policy)."""

    baseline: str = setting(
        "mean", "what is taken off a reward: mean (of its activation's texts) | leave_one_out (of the others)", ("mean", "leave_one_out")
    )
    by_deviation: bool = setting(False, "divide advantages by the standard deviation of their activation's rewards + 1e-4")
    mean_over: str = setting(
        "texts",
        "texts (each text counts the same) | tokens (each token said) | t_text (each text by its length)",
        ("texts", "tokens", "t_text"),
    )
    clip: float = setting(0.2, "with rollouts.inner_steps above 1: how far the ratio of a token may move")
    entropy: Weight = weight(0.0, "bonus for the entropy of the verbalizer's tokens, in nats")


@dataclass
class Gates:
    """Bounds outside which a training on rollouts says, once, that it may be learning nothing; null: no bound."""

    gap: float | None = setting(
        0.01, "least nats per token that a text loses without its activation (the mean in its place); null: not measured"
    )
    distinct: float | None = setting(0.1, "least share of distinct texts")
    spread: float | None = setting(1e-4, "least standard deviation of rewards among an activation's texts")
    reference_kl: float | None = setting(2.0, "most KL to the reference, nats per token")
    length: float | None = setting(1.0, "least mean tokens of a text")
    unfinished: float | None = setting(0.9, "most unfinished texts")
