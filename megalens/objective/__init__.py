"""What trains a lens: the terms of its loss, each a file's idea, and the lens that carries them."""

from __future__ import annotations

from torch import Tensor

from megalens.config import Config
from megalens.families.loading import check_model, load_tokenizer
from megalens.lens.lens import ConsistencyLens
from megalens.lens.prompts import check_fits
from megalens.lens.subject import load_subject
from megalens.objective.anchor import ReferenceKl
from megalens.objective.base import Objective, Pass, Term
from megalens.objective.given import Read, Say, TailRead, TailSay
from megalens.objective.imitate import Imitate, RolloutRead
from megalens.objective.policy import Policy
from megalens.objective.round_trip import Entropy, FunctionalKl, LanguageKl, Mse
from megalens.objective.step import Step

__all__ = ["TERMS", "Objective", "Pass", "Step", "Term", "build_lens"]

TERMS: list[type[Term]] = [TailSay, TailRead, Say, Read, Mse, Entropy, FunctionalKl, LanguageKl, Policy, Imitate, RolloutRead, ReferenceKl]
"""Every term there is, in the order in which they are computed. A new one is registered here."""


def build_lens(config: Config, mean_D: Tensor, var_D: Tensor, empty_blocks: bool = False, to_train: bool = True) -> ConsistencyLens:
    """A fresh lens for a configuration, ready to be trained, from the subject's model and the training activations' statistics.

    Args:
        empty_blocks: leave all blocks (and adapters) on the meta device, for an engine that fills and shards one at a time.
        to_train: False: it is only used, and keeps no copy of what it was when a training began.

    Raises:
        ConfigError: the model cannot be loaded, or the settings do not fit it or each other.
    """
    objective = Objective(config, TERMS)
    tokenizer = load_tokenizer(config)
    check_fits(config, check_model(config), tokenizer)
    subject = load_subject(config, empty_blocks=empty_blocks)
    return ConsistencyLens(config, subject, tokenizer, mean_D, var_D, objective, to_train)
