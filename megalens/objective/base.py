"""An objective: terms with weights, over what one pass of a micro-batch through the lens gives them.

A term names what it needs. The pass computes it once, when the first term asks, and never when none does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from megalens.batch import Batch
from megalens.config import Config, ConfigError
from megalens.config.rules import schedules
from megalens.lens.lens import ConsistencyLens
from megalens.lens.rollouts import Rollouts, divided
from megalens.lens.sampling import ITS_OWN, Alone, Ranks
from megalens.lens.subject import Read
from megalens.lens.text import Text
from megalens.objective.functions import token_mean, weighted_sum
from megalens.objective.reward import Judged, judge
from megalens.objective.step import Step
from megalens.ops import LogProb

NEEDS = ("read", "tails", "given", "text", "rebuild", "rollouts", "reference")


class Term(ABC):
    """One term of the loss: a scalar per micro-batch, the mean over its rows.

    Attributes:
        name: in the metrics.
        needs: which of :data:`NEEDS` it asks its pass for: the subject's ``read`` of the contexts, the contexts' ``tails``, the ``given``
            texts of the batch, the soft ``text`` of a decode, its ``rebuild``, sampled ``rollouts``, the ``reference``
            (the verbalizer as the training found it, kept where such a term ever has a weight).
        free: is it measured at weight 0 too, where other terms need the same?
        trains_text: does its gradient go through the soft text into the verbalizer?
        draws: how many rollouts of each activation it wants.
        reads_rollouts: does the reconstructor learn from them?
    """

    name: str
    needs: frozenset[str] = frozenset()
    free = False
    trains_text = False
    draws = 0
    reads_rollouts = False

    def __init__(self, config: Config):
        self.config = config

    @property
    def key(self) -> str:
        """Its weight in the configuration: a key of its own, or one among ``terms``."""
        return f"terms.{self.name}"

    def weight(self, at: Step) -> float:
        """Its weight at a step; 0 where the configuration gives it none."""
        return at.values.get(self.key, 0.0)

    @abstractmethod
    def __call__(self, made: Pass) -> Tensor:
        """Its value for a micro-batch."""


class Pass:
    """One micro-batch on its way through the lens. What terms ask for is made once, when it is first asked for.

    Args:
        terms: those that ask.
        rollouts: what :meth:`Objective.rollout` sampled for this batch, where a term wants it.

    Attributes:
        figures: scalars to log beside the terms, which they add to.
    """

    def __init__(self, lens: ConsistencyLens, batch: Batch, at: Step, terms: Sequence[Term], rollouts: Rollouts | None = None):
        self.lens, self.batch, self.at, self.config = lens, batch, at, lens.config
        self._needs = frozenset().union(*(term.needs for term in terms))
        self._trains_text = any(term.trains_text for term in terms)
        self._rollouts, self._reads_rollouts = rollouts, any(term.reads_rollouts for term in terms)
        self.figures: dict[str, Tensor] = {} if rollouts is None else dict(rollouts.figures)

    @cached_property
    def activation_BD(self) -> Tensor:
        """The activations ``[B, D]``, read from the subject now where the batch does not bring them."""
        if "activation" in self.batch:
            return self.batch["activation"]
        if "read" in self._needs:
            return self.read.activation_BD.float()
        rows = torch.arange(len(self.batch["position"]), device=self.batch["position"].device)
        return self.lens.subject.residual(self.batch["input_ids"])[rows, self.batch["position"]].float()

    @cached_property
    def read(self) -> Read:
        """The subject's read of the contexts."""
        return self.lens.read(self.batch)

    @cached_property
    def tails(self) -> tuple[Tensor, Tensor | None]:
        """The contexts' tails as explanations ``[B, W]``, in their order, and the tokens of each ``[B]``; None: all."""
        return self.lens.tails(self.batch)

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The given texts as explanations ``[B, W]``, the tokens of each ``[B]``, and the tokens' weights ``[B, W]``; None: 1."""
        if "text_ids" not in self.batch:
            raise ValueError("a term wants given texts, and the batch has none; the loader joins those of given.path")
        return self.batch["text_ids"], self.batch["text_length"], self.batch.get("text_weight")

    @cached_property
    def text(self) -> Text:
        """A soft text per row, decoded with the step's noise; with gradient where a term trains it."""
        with nullcontext() if self._trains_text else torch.no_grad():
            return self.lens.decode(self.activation_BD, self.batch["sample_id"], self.at.update, self.at.values["gumbel_tau_schedule"])

    @cached_property
    def a_hat_BD(self) -> Tensor:
        """The rebuild of the soft text ``[B, D]``."""
        text = self.text
        explained = self.lens.frame.explained(text.ids_BT, text.lengths_B)
        embeds_BTD = text.embeds_BTD if self.config.text_gradient else text.embeds_BTD.detach()
        return self.lens.reconstructor(explained.of(embeds_BTD), explained.lengths_B)

    @property
    def rollouts(self) -> Rollouts:
        """The texts that were sampled for this batch ahead of the pass."""
        if self._rollouts is None:
            raise ValueError("a term wants rollouts and was given none; it must say draws > 0 and need 'rollouts'")
        return self._rollouts

    @cached_property
    def said(self) -> LogProb:
        """Log-probability and entropy of the rollouts' tokens under the law they were sampled by ``[B, K, T]``, with gradient."""
        r = self.rollouts
        floor_NT = None if r.floor_BKT is None else r.floor_BKT.flatten(0, 1)
        found = self.lens.verbalizer.score(self.activation_BD, r.ids_BKT.flatten(0, 1), r.law, floor_NT)
        return LogProb(*(x_NT.view(r.ids_BKT.shape) for x_NT in found))

    @cached_property
    def log_prob_BKT(self) -> Tensor:
        """Log-probability of the rollouts' tokens under the verbalizer's own distribution, with gradient."""
        if self.rollouts.law == ITS_OWN:
            return self.said.log_prob
        return self.lens.verbalizer.log_prob_of(self.activation_BD, self.rollouts.ids_BKT.flatten(0, 1)).view(self.rollouts.ids_BKT.shape)

    @cached_property
    def judged(self) -> Judged:
        """What the rollouts are worth."""
        return judge(self, self._reads_rollouts)

    @torch.no_grad()
    def gap(self) -> Tensor:
        """How much less likely the rollouts are, in nats per token, where the verbalizer is given the mean activation in place of its own.

        The mean is what is zero once it is standardised. At a gap of 0 the texts say nothing of their activation. The first draw of each
        activation tells.
        """
        r, mean_BD = self.rollouts, self.lens.mean.to(self.activation_BD).expand_as(self.activation_BD)
        ids_BT, real_BT, said_BT = r.ids_BKT[:, 0], r.log_prob_BKT[:, 0], r.said_BKT[:, 0]
        floor_BT = None if r.floor_BKT is None else r.floor_BKT[:, 0]
        return token_mean(real_BT - self.lens.verbalizer.score(mean_BD, ids_BT, r.law, floor_BT).log_prob, said_BT)


class Objective:
    """The weighted sum of terms.

    Args:
        config: its weights.
        kinds: the terms there are, in the order in which they are taken.

    Raises:
        ConfigError: ``terms`` names one that there is not.
        ValueError: a term needs what no pass gives.
    """

    def __init__(self, config: Config, kinds: Sequence[type[Term]]):
        self.config, self.terms = config, [kind(config) for kind in kinds]
        for term in self.terms:
            if not term.needs <= set(NEEDS):
                raise ValueError(f"the term {term.name} needs {sorted(term.needs)}; a pass gives {', '.join(NEEDS)}")
        unknown = set(config.terms) - {term.name for term in self.terms if term.key.startswith("terms.")}
        if unknown:
            known = ", ".join(term.key for term in self.terms)
            raise ConfigError(f"terms.{min(unknown)} is the weight of no term of the objective; there are: {known}")

    @property
    def wants_reference(self) -> bool:
        """Does a term that ever has a weight need the verbalizer as it was when the training began?"""
        ever = dict(schedules(self.config))
        return any("reference" in term.needs and any(ever[term.key].ends) for term in self.terms if term.key in ever)

    def weights(self, at: Step) -> dict[str, float]:
        """The weight of every term at a step."""
        return {term.name: term.weight(at) for term in self.terms}

    def draws(self, at: Step) -> int:
        """How many rollouts of each activation the step's terms want; 0: none."""
        return max((term.draws for term in self.terms if term.weight(at)), default=0)

    def __call__(self, lens: ConsistencyLens, batch: Batch, at: Step, rollouts: Rollouts | None = None) -> dict[str, Tensor]:
        """The ``loss`` of a micro-batch and, detached, every term that was computed and what there is to log of its rollouts.

        A lens that is measured, not trained, leaves out the terms on given texts where the batch has none; without other terms there
        is no loss then.

        Raises:
            ConfigError: every weight is 0 at this step.
        """
        weights = self.weights(at)
        asked = [term for term in self.terms if weights[term.name]]
        if not asked:
            raise ConfigError(f"every weight of the loss is 0 at optimizer step {at.update}; let a schedule end above 0")
        if "text_ids" not in batch and not lens.training:
            asked = [term for term in asked if "given" not in term.needs]
            if not asked:
                return {}
        needs = frozenset().union(*(term.needs for term in asked))
        made = Pass(lens, batch, at, asked, rollouts)
        values = {term.name: term(made) for term in self.terms if term in asked or (term.free and term.needs <= needs)}
        if rollouts is not None and self.config.gates.gap is not None:
            made.figures["rollout_gap"] = made.gap()
        return {"loss": weighted_sum(values, weights)} | {name: value.detach() for name, value in (values | made.figures).items()}

    @torch.no_grad()
    def rollout(self, lens: ConsistencyLens, batches: Sequence[Batch], at: Step, ranks: Ranks | None = None) -> list[Rollouts]:
        """The texts that the step's terms want of each micro-batch, sampled from the verbalizer as it stands.

        All micro-batches are sampled together, ``rollouts.at_once`` texts at a time: where weights are sharded, each token gathers them
        once for all.

        Args:
            ranks: the processes that call this together, with as many and as large micro-batches.
        """
        ranks, draws = ranks or Alone(), self.draws(at)
        asked = [term for term in self.terms if term.weight(at)]
        a_ND = torch.cat([Pass(lens, batch, at, asked).activation_BD for batch in batches])
        sample_id_N = torch.cat([batch["sample_id"] for batch in batches])
        rows = max(1, (self.config.rollouts.at_once or len(a_ND) * draws) // draws)
        parts = [
            lens.rollout(a_BD, id_B, at.update, draws, ranks) for a_BD, id_B in zip(a_ND.split(rows), sample_id_N.split(rows), strict=True)
        ]
        return divided(parts, [len(batch["sample_id"]) for batch in batches], ranks)
