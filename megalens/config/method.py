"""Settings of how texts are sampled and what is learnt from them: rollouts, their reward, the policy's gradient, the gates."""

from __future__ import annotations

from dataclasses import dataclass

from megalens.config.fields import setting


@dataclass
class Rollouts:
    """Texts sampled from the verbalizer, for the terms policy, imitate and rollout_read."""

    draws: int = setting(8, "texts of each activation")
    temperature: float = setting(1.0, "divides the logits")
    top_p: float = setting(1.0, "sample from the likeliest tokens that hold this share of the probability; 1: from all")
    at_once: int | None = setting(None, "texts sampled together, per rank; null: all of an optimizer step (fewest gathers)")
