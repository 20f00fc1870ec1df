"""The subject: the frozen LLM under study. Reads activations, and says what it would say next were one of them another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalens.batch import Batch
from megalens.config import Config
from megalens.device import resolve_device
from megalens.engine import Ranks, shard_frozen, shards_weights
from megalens.families.adapters import adapter
from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM
from megalens.families.loading import check_model, load_model, load_without_blocks, subject_fingerprint
from megalens.families.prefix import Prefix, read_prefix
from megalens.families.self_check import check_walk
from megalens.families.weights import WeightFiles


@dataclass
class Read:
    """One read of a batch of contexts: the activation at P ``[B, D]``, the normed last hidden state there ``[B, D]`` (``lm.logits`` of it
    are the true next-token logits), and what patching needs."""

    activation_BD: Tensor
    normed_BD: Tensor
    prefix: Prefix


class Subject(nn.Module):
    """A frozen causal LM and the block whose output is studied.

    Args:
        lm: the model.
        layer_l: activations are the residual stream after this block (0-based; Hugging Face's ``hidden_states[layer_l + 1]``,
            but before the final norm when it is the last block).
        fingerprint: identifies the weights.
        files: where the blocks' weights are read, while the blocks are on the meta device.
    """

    def __init__(self, lm: CausalLM, layer_l: int, fingerprint: str, files: WeightFiles | None = None):
        super().__init__()
        self.files = files
        self.lm = lm
        self.layer_l = layer_l
        self.fingerprint = fingerprint
        self.num_blocks = lm.num_blocks
        self.lm.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Subject:
        """The model is frozen: what is for training only (dropout, a router's jitter) is never on. Adapters' dropout follows ``mode``."""
        super().train(False)
        for layer in self.lm.adapted:
            layer.lora_dropout.train(mode)
        return self

    @property
    def d(self) -> int:
        """Width of an activation."""
        return self.lm.width

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.lm.vocabulary.in_weight.device

    @torch.no_grad()
    def residual(self, input_ids_BC: Tensor) -> Tensor:
        """Residual stream ``[B, C, D]`` after block ``layer_l`` at every position; right padding changes nothing before it."""
        with adapter(self.lm, None):
            return self._lower(input_ids_BC)

    @torch.no_grad()
    def residuals(self, input_ids_BC: Tensor, layers: list[int]) -> Iterator[Tensor]:
        """Residual streams ``[B, C, D]`` after each of some blocks (ascending), one after the other, in one pass."""
        done = 0
        with adapter(self.lm, None):
            positions = torch.arange(input_ids_BC.shape[1], device=input_ids_BC.device)[None]
            hidden = self.lm.enter(self.lm.embed(input_ids_BC), positions)
            for layer in layers:
                hidden = self.lm.run(hidden, done, layer + 1, positions)
                done = layer + 1
                yield hidden

    @torch.no_grad()
    def read(self, input_ids_SC: Tensor, position_B: Tensor, sequence_B: Tensor | None = None) -> Read:
        """Read right-padded contexts once, each for as many rows as have their P in it.

        Args:
            input_ids_SC: token ids; what stands behind a row's ``position_B`` is never seen by it.
            position_B: the position P of each row.
            sequence_B: the context of each row; None: its own.
        """
        with adapter(self.lm, None):
            resid_SCD = self._lower(input_ids_SC)
            rows = torch.arange(len(position_B), device=position_B.device) if sequence_B is None else sequence_B
            last_BD, prefix = read_prefix(self.lm, resid_SCD, self.layer_l + 1, position_B, sequence_B)
            return Read(resid_SCD[rows, position_B], self.lm.final_norm(last_BD), prefix)

    def patched_logits(self, read: Read, a_BD: Tensor) -> Tensor:
        """Next-token logits ``[B, V]`` at P with the activation replaced by ``a_BD``; see :meth:`patched`."""
        return self.lm.logits(self.patched(read, a_BD))

    def patched(self, read: Read, a_BD: Tensor) -> Tensor:
        """Normed last hidden state ``[B, D]`` at P with the activation replaced by ``a_BD``; differentiable in it.

        Exact: causal attention keeps everything before P as it was, so one token goes through the blocks above ``layer_l``, on the
        keys and values of the read.
        """
        with adapter(self.lm, None):
            return self.lm.final_norm(read.prefix.go_on(self.lm, a_BD.to(self.lm.dtype)))

    @torch.no_grad()
    def go_on(
        self,
        input_ids_BC: Tensor,
        tokens: int,
        edit: Callable[[Tensor, Tensor], Tensor] | None = None,
        block: int | None = None,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The subject's own greedy continuation ``[B, tokens]`` of contexts of one length.

        Args:
            input_ids_BC: token ids.
            tokens: how many to say; an end token is said like any other.
            edit: given the residual stream ``[B, S, D]`` after a block and its positions ``[S]``, what goes on in its place: steering.
            block: after which; None: ``layer_l``.
            choose: given logits ``[B, V]``, the next token's ids ``[B, 1]``; None: the likeliest. What it raises ends the continuation.
        """
        lm, cache, said = self.lm, KVCache(), []
        after = (self.layer_l if block is None else block) + 1
        new_BS, start = input_ids_BC, 0
        with adapter(lm, None):
            for _ in range(tokens):
                positions = torch.arange(start, start + new_BS.shape[1], device=input_ids_BC.device)[None]
                hidden = lm.run(lm.enter(lm.embed(new_BS), positions), 0, after, positions, cache=cache)
                if edit is not None:
                    hidden = edit(hidden, positions[0])
                hidden = lm.run(hidden, after, self.num_blocks, positions, cache=cache)
                start += new_BS.shape[1]
                logits_BV = lm.logits(lm.final_norm(hidden[:, -1]))
                new_BS = logits_BV.argmax(-1, keepdim=True) if choose is None else choose(logits_BV)
                said.append(new_BS)
        return torch.cat(said, dim=1)

    @torch.no_grad()
    def next_states(self, prompt_ids_1L: Tensor, ids_BT: Tensor) -> Tensor:
        """Normed hidden states ``[B, T, D]`` from which the subject itself would say each token of a text behind a plain prompt."""
        length, text = prompt_ids_1L.shape[1], ids_BT.shape[1]
        positions = torch.arange(length + text - 1, device=ids_BT.device)[None]
        cache = KVCache()
        with adapter(self.lm, None):
            hidden = self.lm.enter(self.lm.embed(prompt_ids_1L), positions[:, :length])
            hidden = self.lm.run(hidden, 0, self.num_blocks, positions[:, :length], cache=cache)[:, -1:].expand(len(ids_BT), -1, -1)
            if text > 1:
                rest = self.lm.enter(self.lm.embed(ids_BT[:, :-1]), positions[:, length:])
                rest = self.lm.run(rest, 0, self.num_blocks, positions[:, length:], cache=cache)
                hidden = torch.cat([hidden, rest], dim=1)
            return self.lm.final_norm(hidden)

    # ------------------------------------------------------------------------------------- what engines that shard ask

    def shard_units(self) -> list[list[nn.Module]]:
        """What a sharding engine gathers together: the tied vocabulary, and every block."""
        return units_of(self, self.lm, list(self.lm.blocks))

    def slicing(self, ranks: int) -> dict[nn.Module, dict[str, str]]:
        """How ``ranks`` can slice the blocks' layers among them; see :meth:`CausalLM.slicing`."""
        return dict.fromkeys(self.lm.blocks, self.lm.slicing(ranks))

    def check(self, device: torch.device) -> None:
        """Hold the walk against the model's own forward, on the weights that an engine has sharded; all ranks that share them together.

        Args:
            device: where the engine computes.

        Raises:
            ConfigError: they differ.
        """
        with adapter(self.lm, None):
            check_walk(self.lm, device)

    def initial(self, name: str) -> Tensor:
        """The values of a parameter that is on the meta device, read from its file."""
        if self.files is None:
            raise ValueError(f"{name} has no values to start from: the subject was loaded whole")
        return self.files.read(name.removeprefix("lm.model.").replace(".base_layer.", "."))

    def _lower(self, input_ids_BC: Tensor) -> Tensor:
        positions = torch.arange(input_ids_BC.shape[1], device=input_ids_BC.device)[None]
        hidden = self.lm.enter(self.lm.embed(input_ids_BC), positions)
        return self.lm.run(hidden, 0, self.layer_l + 1, positions)


# ------------------------------------------------------------------------------------------------------------- loading


def load_subject(config: Config, upto_block: int | None = None, empty_blocks: bool = False) -> Subject:
    """The subject of ``config.model_name``, on its device and in its dtype.

    Args:
        upto_block: keep only blocks ``0 .. upto_block`` (for a dump, which needs no more); None: all.
        empty_blocks: leave the blocks on the meta device; ``files`` of the subject are where their weights are. Blocks above
            ``upto_block`` are never read then.

    Raises:
        ConfigError: no such model, its files are missing or damaged, ``layer_l`` is not a block of it, or the walk through it differs
            from its own forward.
    """
    settings, device = check_model(config), resolve_device(config.device)
    if empty_blocks:
        lm, files = load_without_blocks(config, settings, device, upto_block)
        return Subject(lm, config.layer_l, subject_fingerprint(config), files)
    lm = CausalLM(load_model(config, settings))
    if upto_block is not None:
        del lm.blocks[upto_block + 1 :]
    subject = Subject(lm, config.layer_l, subject_fingerprint(config)).to(device)
    check_walk(lm)
    return subject


def load_to_read(config: Config) -> tuple[Subject, Ranks]:
    """The subject's blocks ``0 .. layer_l``, for reading activations; under an engine that shards weights this rank's shards of them.

    Returns:
        The subject, and the ranks that share it: they must read equally often, each what it likes. This process alone where it has all.

    Raises:
        ConfigError: as of :func:`load_subject`.
        EngineError: the ranks cannot share it as the engine's settings say.
    """
    if not shards_weights(config):
        subject = load_subject(config, config.layer_l)
        return subject, Ranks(subject.device)
    subject = load_subject(config, config.layer_l, empty_blocks=True)
    ranks = shard_frozen(config, subject)
    subject.check(ranks.device)
    return subject, ranks


def units_of(module: nn.Module, lm: CausalLM, whole: list[nn.Module]) -> list[list[nn.Module]]:
    """What a sharding engine gathers together of a module: the vocabulary, tied or not; each of ``whole``; and each other part."""
    vocabulary = [lm.vocabulary, lm.model.get_input_embeddings(), lm.model.get_output_embeddings()]
    inside = {part for unit in [*whole, *vocabulary] for part in unit.modules()}
    rest = [part for part in module.modules() if part not in inside and any(True for _ in part.parameters(recurse=False))]
    return [vocabulary, *([part] for part in [*whole, *rest])]


def shared_contexts(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows of a batch whose contexts hold every other row's: several positions of one document need one read.

    Returns:
        The rows to read ``[S]``, the longest context of each document, and for each row ``[B]`` which of these holds its own.
        Every row stands for itself where the contexts of a document are not all beginnings of its longest.
    """
    ids_BC, position_B = batch["input_ids"], batch["position"]
    each = torch.arange(len(position_B), device=position_B.device)
    if ids_BC.is_meta:  # shapes alone cannot tell
        return each, each
    doc_S, sequence_B = batch["doc_id"].unique(return_inverse=True)
    if len(doc_S) == len(each):
        return each, each
    rank_B = position_B * len(each) + each
    longest_S = torch.zeros_like(doc_S, dtype=rank_B.dtype).scatter_reduce(0, sequence_B, rank_B, "amax") % len(each)
    behind_BC = torch.arange(ids_BC.shape[1], device=ids_BC.device) > position_B[:, None]
    if not bool(((ids_BC == ids_BC[longest_S[sequence_B]]) | behind_BC).all()):
        return each, each
    return longest_S, sequence_B
