"""The lens: subject, verbalizer and reconstructor as the one module that engines shard, and its training step's loss."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megalens.config import Config, ConfigError
from megalens.families.adapters import adapter_start
from megalens.families.loading import load_tokenizer
from megalens.lens.reconstructor import Reconstructor
from megalens.lens.subject import Read, Subject, load_subject, shared_contexts
from megalens.lens.text import tail_ids
from megalens.lens.verbalizer import Text, Verbalizer
from megalens.objective.functions import relative_mse, resample_error, weighted_sum
from megalens.ops import noise_keys, vocab_kl


@dataclass(frozen=True)
class Step:
    """Where in the training a loss is taken: the optimizer step (for the noise) and the scheduled values."""

    update: int
    tau: float
    alpha: float


class ConsistencyLens(nn.Module):
    """A verbalizer and a reconstructor on one shared, frozen subject.

    Args:
        subject: the frozen LLM.
        tokenizer: its tokenizer.
        mean_D, var_D: per-dimension mean and variance of the training activations.

    Raises:
        ConfigError: ``layer_l`` is the last block while the activation enters there (no block above to speak).
    """

    def __init__(self, config: Config, subject: Subject, tokenizer, mean_D: Tensor, var_D: Tensor):
        super().__init__()
        if mean_D.shape != (subject.d,):
            raise ConfigError(f"the activations are {len(mean_D)} wide, {config.model_name} is {subject.d} wide: they are of another model")
        if config.verbalizer.inject == "block" and config.layer_l + 1 >= subject.num_blocks:
            raise ConfigError(f"layer_l={config.layer_l} is the last block: no block above it can speak; set verbalizer.inject=embedding")
        self.config, self.subject, self.tokenizer = config, subject, tokenizer
        mean_D, var_D = mean_D.to(subject.device), var_D.to(subject.device)
        self.register_buffer("mean", mean_D.float(), persistent=False)
        self.register_buffer("var", var_D.float(), persistent=False)
        with torch.device(subject.device):
            self.verbalizer = Verbalizer(config, subject.lm, tokenizer, mean_D, var_D)
            self.reconstructor = Reconstructor(config, subject.lm, tokenizer, mean_D, var_D)
        plain = tokenizer(config.verbalizer.plain_prompt)["input_ids"] or [tokenizer.eos_token_id]
        self.register_buffer("plain_ids", torch.tensor([plain], device=subject.device), persistent=False)
        if config.compile:
            subject.lm.compile_blocks()

    # ---------------------------------------------------------------------------------------------------- training

    def forward(self, batch: dict[str, Tensor], at: Step) -> dict[str, Tensor]:
        """The loss of a batch and, detached, each of its terms.

        Only what a weight asks for is computed; the terms of weight 0 that come for free (``mse``, ``entropy`` of a round trip) are
        there too, and cost no backward.
        """
        weights = self.loss_weights(at)
        read = None
        if "activation" not in batch:
            batch, read = self._read(batch, weights)
        a_BD = batch["activation"]
        terms: dict[str, Tensor] = {}
        if weights["tail_say"] or weights["tail_read"]:
            tail_BT = self.tail_ids(batch)
            if weights["tail_say"]:
                terms["tail_say"] = -self.verbalizer.log_prob_of(a_BD, tail_BT).mean()
            if weights["tail_read"]:
                terms["tail_read"] = relative_mse(a_BD, self.reconstructor(self.subject.lm.embed(tail_BT)))
        if any(weights[name] for name in ("mse", "kl", "lm", "entropy")):
            terms |= self._round_trip(batch, at, weights, read)
        loss = weighted_sum(terms, weights)
        return {"loss": loss} | {name: value.detach() for name, value in terms.items()}

    def loss_weights(self, at: Step) -> dict[str, float]:
        """The weight of every term at a step."""
        c = self.config
        return {
            "mse": c.mse_weight,
            "kl": c.kl_base_weight,
            "lm": c.lm_base_weight * at.alpha,
            "entropy": -c.entropy_weight,
            "tail_say": c.tail_say_weight,
            "tail_read": c.tail_read_weight,
        }

    def _read(self, batch: dict[str, Tensor], weights: dict[str, float]) -> tuple[dict[str, Tensor], Read | None]:
        """The batch with its activations, read now; the KL term's own read serves for it where there is one."""
        if weights["kl"]:
            read = self.read(batch)
            return {**batch, "activation": read.activation_BD.float()}, read
        rows = torch.arange(len(batch["position"]), device=batch["position"].device)
        return {**batch, "activation": self.subject.residual(batch["input_ids"])[rows, batch["position"]].float()}, None

    def _round_trip(self, batch: dict[str, Tensor], at: Step, weights: dict[str, float], read: Read | None) -> dict[str, Tensor]:
        a_BD, c = batch["activation"], self.config
        needs_text_gradient = (c.text_gradient and (weights["mse"] or weights["kl"])) or weights["lm"] or weights["entropy"]
        with nullcontext() if needs_text_gradient else torch.no_grad():
            keys = partial(noise_keys, c.seed, at.update, batch["sample_id"])
            text = self.verbalizer.decode(a_BD, keys, at.tau, c.gumbel_noise, batch["sample_id"] if c.detect_anomaly else None)
        embeds_BTD = text.embeds_BTD if c.text_gradient else text.embeds_BTD.detach()
        a_hat_BD = self.reconstructor(embeds_BTD)
        terms = {"mse": relative_mse(a_BD, a_hat_BD), "entropy": text.entropy_BT.mean()}
        if weights["kl"]:
            terms["kl"] = self._functional_kl(batch, a_hat_BD, read).mean()
        if weights["lm"]:
            terms["lm"] = self._lm_kl(text).mean()
        return terms

    def _functional_kl(self, batch: dict[str, Tensor], a_hat_BD: Tensor, read: Read | None) -> Tensor:
        """KL(M(a) || M(a_hat + delta)) per row, delta the error of the row's partner; the contexts are read unless they were."""
        read = read or self.read(batch)
        delta_BD = resample_error(batch["activation"].to(a_hat_BD.dtype), a_hat_BD)
        return self._vocab_kl(read.normed_BD, self.subject.patched(read, a_hat_BD + delta_BD))

    def read(self, batch: dict[str, Tensor]) -> Read:
        """The subject's read of a batch's contexts; several positions of one document share it."""
        rows_S, sequence_B = shared_contexts(batch)
        return self.subject.read(batch["input_ids"][rows_S], batch["position"], sequence_B)

    def _lm_kl(self, text: Text) -> Tensor:
        """KL(verbalizer || subject on the plain-text prompt) per row and token ``[B, T]``; the subject is a constant."""
        plain_BTD = self.subject.next_states(self.plain_ids, text.ids_BT)
        return self._vocab_kl(text.normed_BTD.flatten(0, 1), plain_BTD.flatten(0, 1)).view(text.ids_BT.shape)

    def _vocab_kl(self, p_ND: Tensor, q_ND: Tensor) -> Tensor:
        """KL(p || q) per row of next-token distributions given by normed hidden states."""
        lm = self.subject.lm
        return lm.vocabulary(lambda out, _, bias: vocab_kl(p_ND, q_ND, out, out, p_bias=bias, q_bias=bias, softcap=lm.softcap))

    # ------------------------------------------------------------------------------------------------------- using

    @torch.no_grad()
    def verbalize(self, a_BD: Tensor) -> Tensor:
        """Greedy explanations ``[B, t_text]`` (token ids) of activations ``[B, D]``."""
        return self.verbalizer.decode(a_BD.to(self.mean.device)).ids_BT

    @torch.no_grad()
    def reconstruct(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Activations ``[B, D]`` (float32) rebuilt from right-padded token ids; a length may be 0."""
        device = self.mean.device
        return self.reconstructor(self.subject.lm.embed(ids_BT.to(device)), lengths_B.to(device))

    def tail_ids(self, batch: dict[str, Tensor]) -> Tensor:
        """The contexts' tails ``[B, t_text]`` in ``tail_order``."""
        return tail_ids(batch["input_ids"], batch["position"], self.config.t_text, self.config.tail_order)

    # ------------------------------------------------------------------------------------------------- its parameters

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters by group (``projection_layers``, ``prompts``, ``base_model``) and name in the state dict."""
        groups: dict[str, dict[str, nn.Parameter]] = {"projection_layers": {}, "prompts": {}, "base_model": {}}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                head = "prompts" if ".prompt." in name or ".suffix." in name else "projection_layers"
                groups["base_model" if ".lora_" in name or ".own" in name else head][name] = parameter
        return groups

    def shard_units(self) -> list[list[nn.Module]]:
        """What a sharding engine gathers together: the tied vocabulary, every block, and each other part that is called on its own."""
        lm = self.subject.lm
        whole = [*lm.blocks, *self.verbalizer.own.values(), *self.reconstructor.own.values(), self.verbalizer.projection]
        whole.append(self.reconstructor.head)
        vocabulary = [lm.vocabulary, lm.model.get_input_embeddings(), lm.model.get_output_embeddings()]
        inside = {part for unit in [*whole, *vocabulary] for part in unit.modules()}
        rest = [part for part in self.modules() if part not in inside and any(True for _ in part.parameters(recurse=False))]
        return [vocabulary, *([part] for part in [*whole, *rest])]

    def slicing(self, ranks: int) -> dict[nn.Module, dict[str, str]]:
        """How ``ranks`` can slice layers among them (tensor parallelism): by module and path within it, see :meth:`CausalLM.slicing`."""
        lm = self.subject.lm
        return dict.fromkeys([*lm.blocks, *self.verbalizer.own.values(), *self.reconstructor.own.values()], lm.slicing(ranks))

    def lens_state_names(self) -> list[str]:
        """Names in the state dict of all that is not the frozen subject: what a checkpoint of the lens holds."""
        return [name for name, _ in self.named_parameters() if not name.startswith("subject.") or ".lora_" in name]

    def load_lens_state(self, state: dict[str, Tensor]) -> None:
        """Take over the weights of a checkpoint.

        Raises:
            ConfigError: weights are missing, unknown, or of another shape.
        """
        parameters = dict(self.named_parameters())
        wanted = {name: tuple(parameters[name].shape) for name in self.lens_state_names()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ConfigError(
                    f"the checkpoint does not fit this lens: {name} is {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                )
        with torch.no_grad():
            for name, value in state.items():
                if not parameters[name].is_meta:
                    parameters[name].copy_(value)

    def initial(self, name: str) -> Tensor:
        """What a parameter that is on the meta device starts as: a block's weights (the lens' own are copies), or an adapter's."""
        lm, (role, rest) = self.subject.lm, name.split(".", 1)
        if ".lora_" in name:
            return adapter_start(self.config.seed, rest.removeprefix("lm."), self.get_parameter(name).shape)
        if role == "subject":
            return self.subject.files.read(rest.removeprefix("lm.model.").replace(".base_layer.", "."))
        index, within = rest.removeprefix("own.").split(".", 1)
        block = next(path for path, module in lm.model.named_modules() if module is lm.blocks[int(index)])
        return self.subject.files.read(f"{block}.{within}")


def build_lens(config: Config, mean_D: Tensor, var_D: Tensor, empty_blocks: bool = False) -> ConsistencyLens:
    """A fresh lens for a configuration, from the subject's model and the training activations' statistics.

    Args:
        empty_blocks: leave all blocks (and adapters) on the meta device, for an engine that fills and shards one at a time.
    """
    return ConsistencyLens(config, load_subject(config, empty_blocks=empty_blocks), load_tokenizer(config), mean_D, var_D)
