"""The lens: subject, verbalizer and reconstructor as the one module that engines shard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from megalens import engine
from megalens.batch import Batch
from megalens.config import Config, ConfigError
from megalens.families.adapters import adapter_start
from megalens.lens.frame import Frame
from megalens.lens.names import GROUPS, group_of, module_names, stable_name
from megalens.lens.prompts import prompts_of, window_of
from megalens.lens.reconstructor import Prefix, Reconstructor
from megalens.lens.rollouts import Rollouts
from megalens.lens.sampling import ITS_OWN, Law, Ranks
from megalens.lens.subject import Read, Subject, shared_contexts, units_of
from megalens.lens.text import Text, lengths_of, read_order, tail_ids
from megalens.lens.verbalizer import Verbalizer
from megalens.ops import noise_keys


class ConsistencyLens(nn.Module):
    """A verbalizer and a reconstructor on one shared, frozen subject.

    Args:
        subject: the frozen LLM.
        tokenizer: its tokenizer.
        mean_D, var_D: per-dimension mean and variance of the training activations.
        objective: what trains it (:class:`megalens.objective.Objective`); None: it is only used.
        to_train: False: keep no copy of the verbalizer as it is now, whatever the objective wants.

    Attributes:
        ranks: the processes that use it together, each with its shards or all of it; alone unless somebody who loads it sets them. An
            engine that trains it has its own.

    Raises:
        ConfigError: ``layer_l`` is the last block while the activation enters there (no block above to speak).
    """

    mean: Tensor
    var: Tensor
    plain_ids: Tensor
    reference: Verbalizer | None

    def __init__(
        self,
        config: Config,
        subject: Subject,
        tokenizer: PreTrainedTokenizerBase,
        mean_D: Tensor,
        var_D: Tensor,
        objective: Any = None,
        to_train: bool = True,
    ):
        super().__init__()
        if mean_D.shape != (subject.d,):
            raise ConfigError(f"the activations are {len(mean_D)} wide, {config.model_name} is {subject.d} wide: they are of another model")
        if config.verbalizer.inject == "block" and config.layer_l + 1 >= subject.num_blocks:
            raise ConfigError(f"layer_l={config.layer_l} is the last block: no block above it can speak; set verbalizer.inject=embedding")
        self.config, self.subject, self.tokenizer, self.objective = config, subject, tokenizer, objective
        self.ranks = engine.Ranks(subject.device)
        self.frame = Frame(config, tokenizer)
        mean_D, var_D = mean_D.to(subject.device), var_D.to(subject.device)
        self.register_buffer("mean", mean_D.float(), persistent=False)
        self.register_buffer("var", var_D.float(), persistent=False)
        with torch.device(subject.device):
            self.verbalizer = Verbalizer(config, subject.lm, tokenizer, mean_D, var_D)
            self.reconstructor = Reconstructor(config, subject.lm, tokenizer, mean_D, var_D)
            self.reference = None
            if to_train and objective is not None and objective.wants_reference:
                self.reference = Verbalizer(config, subject.lm, tokenizer, mean_D, var_D, frozen_as="reference")
        self._set_reference()
        plain = prompts_of(config, tokenizer).plain
        self.register_buffer("plain_ids", torch.tensor([plain], device=subject.device), persistent=False)
        if config.compile:
            subject.lm.compile_blocks()

    # ---------------------------------------------------------------------------------------------------- training

    def forward(self, batch: Batch, at: Any, rollouts: Rollouts | None = None) -> dict[str, Tensor]:
        """The ``loss`` of a micro-batch and, detached, each of its terms, as the lens's objective computes them.

        Args:
            at: where in the training (:class:`megalens.objective.Step`).
            rollouts: what :meth:`sample` gave for this batch, where the objective wants some.
        """
        return self.objective(self, batch, at, rollouts)

    def sample(self, batches: Sequence[Batch], at: Any, ranks: Ranks) -> list[Rollouts] | None:
        """The rollouts that the objective wants for micro-batches at a step, without gradient; None: none.

        Args:
            ranks: the processes that call this together, with as many micro-batches.
        """
        return self.objective.rollout(self, batches, at, ranks) if self.objective.draws(at) else None

    def read(self, batch: Batch) -> Read:
        """The subject's read of a batch's contexts; several positions of one document share it."""
        rows_S, sequence_B = shared_contexts(batch)
        return self.subject.read(batch["input_ids"][rows_S], batch["position"], sequence_B)

    # ------------------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def verbalize(self, a_BD: Tensor) -> Tensor:
        """Greedy texts ``[B, t_text]`` (token ids) of activations ``[B, D]``; :attr:`frame` tells where they end."""
        return self.verbalizer.decode(a_BD.to(self.mean.device)).ids_BT

    def decode(self, a_BD: Tensor, sample_id_B: Tensor, update: int, tau: float) -> Text:
        """A soft text per activation ``[B, D]``, drawn with ``gumbel_noise`` as it falls for these samples at an optimizer step."""
        c = self.config
        keys = partial(noise_keys, c.seed, update, sample_id_B)
        return self.verbalizer.decode(a_BD, keys, tau, c.gumbel_noise, sample_id_B if c.detect_anomaly else None)

    @torch.no_grad()
    def rollout(self, a_BD: Tensor, sample_id_B: Tensor, update: int, draws: int, ranks: Ranks | None = None) -> Rollouts:
        """``draws`` texts of each activation ``[B, D]``, sampled from the verbalizer as ``rollouts`` says.

        A pure function of (seed, optimizer step, sample, draw): the same on any number of ranks.

        Args:
            ranks: the processes that call this together; None: :attr:`ranks`.
        """
        c, end_id = self.config, self.verbalizer.end_id
        law = Law(c.rollouts.temperature, c.rollouts.top_p)
        draw_N = torch.arange(draws, device=sample_id_B.device).repeat(len(sample_id_B))
        keys = partial(noise_keys, c.seed, update, sample_id_B.repeat_interleave(draws), draw=draw_N)
        found = self.verbalizer.sample(a_BD, keys, draws, law, ranks or self.ranks)
        ids_BKT, log_prob_BKT = (x.unflatten(0, (-1, draws)) for x in (found.ids_NT, found.log_prob_NT))
        floor_BKT = None if found.floor_NT is None else found.floor_NT.unflatten(0, (-1, draws))
        length_N = torch.full_like(draw_N, c.t_text) if end_id is None else lengths_of(found.ids_NT, end_id)
        return Rollouts(ids_BKT, length_N.unflatten(0, (-1, draws)), log_prob_BKT, law, floor_BKT, end_id is not None)

    @torch.no_grad()
    def reconstruct(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Activations ``[B, D]`` (float32) rebuilt from right-padded token ids; a length may be 0.

        Raises:
            ConfigError: with the reconstructor's prompts, they are longer than the subject's window.
        """
        if (length := self.reconstructor.length_with(ids_BT.shape[1])) > (window_of(self.subject.lm.config) or length):
            raise ConfigError(f"a text of {ids_BT.shape[1]} tokens does not fit the window of {self.config.model_name}; shorten it")
        device = self.mean.device
        return self.reconstructor(self.subject.lm.embed(ids_BT.to(device)), lengths_B.to(device))

    def tails(self, batch: Batch, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The contexts' tails in ``tail_order``, as explanations ``[B, W]``, and how many tokens each has; None: all.

        Args:
            lengths_B: how many each shall have; None: ``t_text``, or with an end token as many as there is room and context for.
        """
        reach, position_B = self.frame.room if lengths_B is None else max(1, int(lengths_B.max())), batch["position"]
        if self.frame.end_id is not None:
            lengths_B = (position_B + 1).clamp_max(reach if lengths_B is None else lengths_B)
        return tail_ids(batch["input_ids"], position_B, reach, self.config.tail_order, lengths_B), lengths_B

    @torch.no_grad()
    def reference_log_prob(self, a_BD: Tensor, ids_NT: Tensor, law: Law = ITS_OWN) -> Tensor:
        """Log-probabilities ``[N, T]``, in nats, that the verbalizer gave to texts when the training began; as :meth:`Verbalizer.score`.

        Raises:
            ValueError: no weight asks for the reference, so none was kept.
        """
        if self.reference is None:
            raise ValueError("the verbalizer as it was when the training began is kept only where terms.reference_kl has a weight")
        return self.reference.score(a_BD, ids_NT, law).log_prob

    @torch.no_grad()
    def reconstruct_swaps(self, ids_GT: Tensor, lengths_G: Tensor, place: int, group_B: Tensor, token_B: Tensor) -> Tensor:
        """Activations ``[B, D]`` (float32) rebuilt from texts with another token at one place; what stands before it is run once a text.

        The same as :meth:`reconstruct` of the swapped texts.

        Args:
            ids_GT: the texts, right-padded.
            lengths_G: tokens of each, more than ``place``.
            place: of the token, in the order of reading.
            group_B: which text each swap is of.
            token_B: the token in that place.
        """
        device, lm = self.mean.device, self.subject.lm
        ids_GT, lengths_G, group_B = ids_GT.to(device), lengths_G.to(device), group_B.to(device)
        if self.reconstructor.first_is_last:
            ids_GT = read_order(ids_GT[..., None], lengths_G)[..., 0]
        rest_BS = ids_GT[group_B, place:]
        rest_BS[:, 0] = token_B.to(device)
        behind = Prefix(lm.embed(ids_GT[:, :place]), group_B)
        return self.reconstructor(lm.embed(rest_BS), lengths_G[group_B] - place, behind)

    # ------------------------------------------------------------------------------------------------- its parameters

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters by group (``verbalizer.adapters``, ``reconstructor.head``, ...) and name in the state dict."""
        groups: dict[str, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[group_of(stable_name(name))][name] = parameter
        return {group: members for group, members in groups.items() if members}

    def shard_units(self) -> list[list[nn.Module]]:
        """What a sharding engine gathers together: the tied vocabulary, every block, and each other part that is called on its own."""
        maps = [self.verbalizer.projection, self.reconstructor.head]
        maps += [self.reference.projection] if self.reference is not None else []
        return units_of(self, self.subject.lm, [*self.all_blocks(), *(part for part in maps if any(True for _ in part.parameters()))])

    def slicing(self, ranks: int) -> dict[nn.Module, dict[str, str]]:
        """How ``ranks`` can slice layers among them (tensor parallelism): by module and path within it, see :meth:`CausalLM.slicing`."""
        return dict.fromkeys(self.all_blocks(), self.subject.lm.slicing(ranks))

    def lens_state_names(self) -> list[str]:
        """Names in the module of all that is neither the frozen subject nor the reference: what a lens is (under stable names)."""
        return [name for name in self._state_names() if not _is_of_reference(name)]

    def reference_state_names(self) -> list[str]:
        """Names in the module of what the verbalizer was when the training began; none where no term wants it."""
        return [name for name in self._state_names() if _is_of_reference(name)]

    def load_lens_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take over the weights of a checkpoint.

        Args:
            state: weights by their stable names (:mod:`megalens.lens.names`). Where it holds no reference, the state's own verbalizer
                becomes it: a training that starts from this lens stays near this lens.

        Returns:
            The same by the names that parameters have in this module, for an engine.

        Raises:
            ConfigError: weights are missing, unknown, or of another shape.
        """
        parameters, names = dict(self.named_parameters()), module_names(self._state_names())
        if self.reference is not None:
            state = {_as_reference(name): value for name, value in state.items() if name.startswith("verbalizer.")} | state
        wanted = {stable: tuple(parameters[name].shape) for stable, name in names.items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ConfigError(
                    f"the checkpoint does not fit this lens: {name} is {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                )
        by_name = {names[stable]: value for stable, value in state.items()}
        with torch.no_grad():
            for name, value in by_name.items():
                if not parameters[name].is_meta:
                    parameters[name].copy_(value)
        return by_name

    def initial(self, name: str) -> Tensor:
        """What a parameter that is on the meta device starts as: a block's weights (the lens' own are copies), or an adapter's."""
        lm, (role, rest) = self.subject.lm, name.split(".", 1)
        if ".lora_" in name:
            as_first_named = rest.removeprefix("lm.").replace(".reference.", ".verbalizer.")
            return adapter_start(self.config.seed, as_first_named, self.get_parameter(name).shape)
        if role == "subject":
            return self.subject.initial(rest)
        index, within = rest.removeprefix("own.").split(".", 1)
        block = next(path for path, module in lm.model.named_modules() if module is lm.blocks[int(index)])
        return self.subject.initial(f"lm.model.{block}.{within}")

    def all_blocks(self) -> list[nn.Module]:
        """The subject's blocks and every role's own."""
        own = [self.verbalizer.own, self.reconstructor.own, *([] if self.reference is None else [self.reference.own])]
        return [*self.subject.lm.blocks, *(block for blocks in own for block in blocks.values())]

    def _state_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if not name.startswith("subject.") or ".lora_" in name]

    @torch.no_grad()
    def _set_reference(self) -> None:
        """Make the reference what the verbalizer is now, but for what is on the meta device."""
        if self.reference is None:
            return
        names = module_names(self._state_names())
        for stable, name in names.items():
            if stable.startswith("verbalizer.") and not (value := self.get_parameter(name)).is_meta:
                self.get_parameter(names[_as_reference(stable)]).copy_(value)


def _is_of_reference(name: str) -> bool:
    return name.startswith("reference.") or ".reference." in name


def _as_reference(stable: str) -> str:
    """What a weight of the verbalizer is called in the reference."""
    return f"reference.{stable.removeprefix('verbalizer.')}"
