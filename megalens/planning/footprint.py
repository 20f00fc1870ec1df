"""Memory, FLOPs and gathered parameters of one training step, measured without the model's weights.

The lens takes the step on PyTorch's meta device, where tensors have shapes but no content. All three are counted meanwhile.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megalens.batch import Batch
from megalens.config import Config, ConfigError
from megalens.config.rules import schedules
from megalens.families.causal_lm import CausalLM
from megalens.families.loading import check_model, model_options
from megalens.families.protocol import Settings
from megalens.lens.lens import ConsistencyLens
from megalens.lens.rollouts import Rollouts
from megalens.lens.subject import Subject
from megalens.objective import TERMS, Objective, Step
from megalens.ops.tile import tile_size
from megalens.planning.attention import fused_attention
from megalens.planning.flops import FLOPS
from megalens.planning.words import tokenizer_or_words

# A step is linear in the samples, the blocks up to layer_l and the blocks above it, and of second degree in the tokens of a text; small
# measurements give all of it.
_SMALL, _SAMPLES, _TOKENS = (2, 2), (2, 4), (10, 15, 20)
_Line = tuple[float, float]  # of a quantity: fixed, and per sample


@dataclass(frozen=True)
class Sampling:
    """What one call that samples rollouts needs, ``fixed + n * per_sample`` for all texts of n activations.

    Attributes:
        passed, gathers: elements gathered in a call in which every unit is gathered at each use, and the number of those uses.
        summed_fixed, summed_per_sample: elements of hidden states that tensor-parallel ranks sum.
        bytes_fixed, bytes_per_sample: bytes allocated at its peak, with the tiles of logits.
        flops_fixed, flops_per_sample: FLOPs.
    """

    passed: float
    gathers: float
    summed_fixed: float
    summed_per_sample: float
    bytes_fixed: float
    bytes_per_sample: float
    flops_fixed: float
    flops_per_sample: float


@dataclass(frozen=True)
class Footprint:
    """What a lens and one step of it need. Parameters and hidden states are counted in elements, not bytes.

    A quantity of a step with n samples is ``fixed + n * per_sample``.

    Attributes:
        frozen, trained: elements of the frozen and of the trained parameters.
        sizes: elements of each parameter.
        width: bytes of an element.
        vocabulary, block: elements of the vocabulary and of the largest block; a sharded engine gathers each of them as one.
        blocks: elements of all blocks, the roles' own too.
        trained_block: trained elements of the block that trains most.
        passed, gathers: elements gathered in a step in which every unit is gathered at each use, and the number of those uses.
        summed_fixed, summed_per_sample: elements of hidden states that tensor-parallel ranks sum in a step; 0 without them.
        bytes_fixed, bytes_per_sample: bytes allocated at a step's peak, beside parameters, gradients and optimizer.
        flops_fixed, flops_per_sample: FLOPs of a step.
        kv_per_sample: bytes of the decode's keys and values; ``bytes_per_sample`` contains them.
        tiles_fixed, tiles_per_sample: bytes that vocabulary operations, with their tiles of logits, add to that peak; negative where
            they stay below it.
        sampling: of the rollouts ahead of the step; None where no term wants any.
    """

    frozen: int
    trained: int
    sizes: tuple[int, ...]
    width: int
    vocabulary: int
    block: int
    blocks: int
    trained_block: int
    passed: float
    gathers: float
    summed_fixed: float
    summed_per_sample: float
    bytes_fixed: float
    bytes_per_sample: float
    flops_fixed: float
    flops_per_sample: float
    kv_per_sample: float
    tiles_fixed: float
    tiles_per_sample: float
    sampling: Sampling | None = None


_QUANTITIES = 6  # of :func:`_counted`


def footprint(config: Config) -> Footprint:
    """Measure a configuration's lens and step. It needs the model's ``config.json``, not its weights.

    With ``fsdp.tensor_ranks`` it is the part of one rank: its slices of the blocks, and the whole vocabulary.

    Raises:
        ConfigError: no such model, ``layer_l`` is not a block of it, or its blocks cannot be sliced so.
    """
    lens = meta_lens(config)
    parameters, (*blocks, vocabulary) = list(lens.parameters()), _units(lens)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    step, sampled = _step(config, config.layer_l + 1, lens.subject.num_blocks - config.layer_l - 1)
    peak, flops, passed, gathers, summed, tiles = step
    model = lens.subject.lm.config
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    tokens = lens.verbalizer.length + config.t_text - 1
    width = lens.subject.lm.dtype.itemsize
    return Footprint(
        frozen=sum(p.numel() for p in parameters) - trained,
        trained=trained,
        sizes=tuple(p.numel() for p in parameters),
        width=width,
        vocabulary=_numel(vocabulary),
        block=max(map(_numel, blocks)),
        blocks=sum(map(_numel, blocks)),
        trained_block=max(sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks),
        passed=passed[0],
        gathers=gathers[0],
        summed_fixed=summed[0],
        summed_per_sample=summed[1],
        bytes_fixed=peak[0],
        bytes_per_sample=peak[1],
        flops_fixed=flops[0],
        flops_per_sample=flops[1],
        kv_per_sample=2.0 * heads * head * model.num_hidden_layers * tokens * width if _decodes(config) else 0.0,
        tiles_fixed=tiles[0],
        tiles_per_sample=tiles[1],
        sampling=_sampling(*sampled) if sampled else None,
    )


def _sampling(peak: _Line, flops: _Line, passed: _Line, gathers: _Line, summed: _Line, tiles: _Line) -> Sampling:
    whole = [a + max(0.0, b) for a, b in zip(peak, tiles, strict=True)]
    return Sampling(passed[0], gathers[0], summed[0], summed[1], whole[0], whole[1], flops[0], flops[1])


def _decodes(config: Config) -> bool:
    """Does a term take a soft text, whose keys and values stay until backward?"""
    at = fullest(config)
    return any("text" in term.needs and term.weight(at) for term in Objective(config, TERMS).terms)


def _step(config: Config, lower: int, upper: int) -> tuple[list[_Line], list[_Line]]:
    """Each quantity of :func:`_measure` for ``lower`` blocks up to ``layer_l`` and ``upper`` above it: of a step, and of its sampling."""
    lengths = (config.t_text,) if config.t_text <= max(_TOKENS) else _TOKENS
    found = [_at_depth(dataclasses.replace(config, t_text=length), lower, upper) for length in lengths]
    shares = [math.prod((config.t_text - b) / (a - b) for b in lengths if b != a) for a in lengths]
    lines = [
        (sum(w * a for w, (a, _) in each), sum(w * b for w, (_, b) in each))
        for each in (list(zip(shares, q, strict=True)) for q in zip(*found, strict=True))
    ]
    return lines[:_QUANTITIES], lines[_QUANTITIES:]


def _at_depth(config: Config, lower: int, upper: int) -> list[_Line]:
    """Each quantity of :func:`_measure`, for so many blocks."""
    at = {depth: _measure(config, *depth) for depth in [_SMALL, (_SMALL[0] + 1, _SMALL[1]), (_SMALL[0], _SMALL[1] + 1)]}
    base, *more = at.values()
    result = []
    for quantity in range(len(base[0])):
        few, many = (
            base[i][quantity] + sum(n * (m[i][quantity] - base[i][quantity]) for n, m in zip(_beyond(lower, upper), more, strict=True))
            for i in range(2)
        )
        each = (many - few) / (_SAMPLES[1] - _SAMPLES[0])
        result.append((few - _SAMPLES[0] * each, each))
    return result


def _beyond(lower: int, upper: int) -> tuple[int, int]:
    return lower - _SMALL[0], upper - _SMALL[1]


def _measure(config: Config, lower: int, upper: int) -> list[tuple[float, ...]]:
    """The :func:`_counted` quantities of a step and, where a term wants rollouts, of sampling them; for each of ``_SAMPLES``."""
    lens = meta_lens(config, (lower, upper))
    found: list[tuple[float, ...]] = []
    for samples in _SAMPLES:
        batch = meta_batch(config, lens, samples)
        rollouts, sampled = _counted(config, lens, partial(sample_rollouts, lens, batch))
        _, step = _counted(config, lens, partial(take_step, lens, batch, rollouts))
        found.append(step if rollouts is None else step + sampled)
    return found


def _counted(config: Config, lens: ConsistencyLens, work: Callable[[], Any]) -> tuple[Any, tuple[float, ...]]:
    """What some work gives; its peak bytes, FLOPs, elements gathered, gathers, elements summed, bytes the vocabulary adds to the peak."""
    with (
        _counted_uses(_units(lens)) as uses,
        fused_attention(),
        LiveBytes(lens) as live,
        FlopCounterMode(display=False, custom_mapping=FLOPS) as flops,
    ):
        result = work()
    passed, summed = sum(use[0] for use in uses), _summed(config, lens, uses)
    return result, (live.peak, flops.get_total_flops(), passed, len(uses), summed, live.tiled - live.peak)


# ------------------------------------------------------------------------------------------------ the lens and its step


def meta_lens(config: Config, depth: tuple[int, int] | None = None) -> ConsistencyLens:
    """The lens of a configuration on the meta device; ``depth`` gives it other numbers of blocks up to ``layer_l`` and above."""
    settings = check_model(config)
    if depth is not None:
        config = dataclasses.replace(config, layer_l=depth[0] - 1)
        settings.num_hidden_layers = sum(depth)
        if getattr(settings, "layer_types", None):
            settings.layer_types = (settings.layer_types * sum(depth))[: sum(depth)]
    _slice(settings, config.fsdp.tensor_ranks)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, **model_options(config, settings))
        subject = Subject(CausalLM(model), config.layer_l, "none")
        return ConsistencyLens(
            config, subject, tokenizer_or_words(config), torch.zeros(subject.d), torch.ones(subject.d), Objective(config, TERMS)
        )


def _slice(settings: Settings, ranks: int) -> None:
    """Change a model's settings to the shapes of one of so many tensor-parallel ranks."""
    if ranks == 1:
        return
    counts = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    if any((getattr(settings, name, None) or 1) % ranks for name in counts):
        raise ConfigError(f"{ranks} ranks cannot share the heads and hidden units of a model of type '{settings.model_type}' evenly")
    settings.head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    for name in counts:
        setattr(settings, name, getattr(settings, name) // ranks)


def meta_batch(config: Config, lens: ConsistencyLens, samples: int) -> Batch:
    """A batch of contexts of the greatest length, on the meta device."""
    ids = torch.zeros(samples, config.activation_dumper.seq_len, dtype=torch.long, device="meta")
    row = torch.zeros(samples, dtype=torch.long, device="meta")
    activation = torch.zeros(samples, lens.subject.d, device="meta")
    batch = Batch(activation=activation, input_ids=ids, position=row, sample_id=row, doc_id=row)
    if config.given.path is not None:
        batch["text_ids"], batch["text_length"] = row[:, None].expand(-1, lens.frame.room), row
    return batch


def fullest(config: Config) -> Step:
    """A step at which every schedule stands at its largest: what has a weight at some time has it here."""
    return Step.fixed(config, 0, **{key: max(schedule.ends, key=abs) for key, schedule in schedules(config)} | {"gumbel_tau_schedule": 1.0})


def sample_rollouts(lens: ConsistencyLens, batch: Batch) -> Rollouts | None:
    """The rollouts of a batch, each of ``t_text`` tokens; None where no term wants any."""
    draws = lens.objective.draws(fullest(lens.config))
    return lens.rollout(batch["activation"], batch["sample_id"], 0, draws) if draws else None


def take_step(lens: ConsistencyLens, batch: Batch, rollouts: Rollouts | None = None) -> None:
    """Run forward and backward. Each gradient is freed as soon as it is there, as engines do that pass it on."""

    def hand_on(parameter: nn.Parameter) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(hand_on) for p in lens.parameters() if p.requires_grad]
    lens(batch, fullest(lens.config), rollouts)["loss"].backward()
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------------------------- counting


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of tensors that operations made and that are still referred to.

    Args:
        module: the lens; its parameters and buffers, and views of them, do not count.

    Attributes:
        live: bytes now.
        peak: the most there were.
        tiled: the most there were during a vocabulary operation, with the tiles of logits inside it.
    """

    def __init__(self, module: ConsistencyLens) -> None:
        super().__init__()
        self._rows = module.subject.lm.vocabulary.in_weight.shape[0]
        self.live, self.peak, self.tiled = 0, 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        if any(isinstance(value, torch.Tensor) and self._rows in value.shape for value in tree_leaves(args)):
            self.tiled = max(self.tiled, self.live + _tile_bytes(function, args))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name not in self._known and storage.nbytes():
            self._known.add(name)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._gone, name, storage.nbytes())

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


def _tile_bytes(function, args) -> int:
    """Bytes of the float32 logits, and of their gradients, that a vocabulary operation holds at once."""
    kind = getattr(function, "overloadpacket", None)
    if kind is torch.ops.megalens.vocab_divergences:
        hidden_ND, weight_VD, tiles = args[0], args[2], 2
    elif kind is torch.ops.megalens.vocab_divergences_backward:
        hidden_ND, weight_VD, tiles = args[2][0], args[2][2], 2 + sum(args[6][:2])
    elif kind in (torch.ops.megalens.vocab_log_prob, torch.ops.megalens.vocab_log_prob_backward):
        hidden_ND, weight_VD, *_ = args if kind is torch.ops.megalens.vocab_log_prob else args[1:]
        return 4 * tile_size(weight_VD, len(hidden_ND)) * len(hidden_ND)
    else:
        return 0
    return 4 * tiles * tile_size(weight_VD) * len(hidden_ND)


@contextmanager
def _counted_uses(units: list[nn.Module]) -> Iterator[list[tuple[int, int, bool]]]:
    """List each use of a unit: elements of its parameters, elements of its result, and whether this is a backward pass.

    A forward pass whose result needs a gradient is followed by a backward pass, which is another use.
    """
    uses: list[tuple[int, int, bool]] = []

    def used(unit, _, result) -> None:
        results = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        size = _numel(unit), sum(value.numel() for value in results)
        uses.append((*size, False))
        if any(value.requires_grad for value in results):
            uses.append((*size, True))

    hooks = [unit.register_forward_hook(used) for unit in units]
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()


def _summed(config: Config, lens: ConsistencyLens, uses: list[tuple[int, int, bool]]) -> int:
    """Elements that the ranks of a sliced model sum: in forward after each rowwise layer, in backward for each input of colwise layers."""
    if config.fsdp.tensor_ranks == 1:
        return 0
    slicing, vocabulary = lens.subject.lm.slicing(1), _numel(lens.subject.lm.vocabulary)
    forward = [path for path, kind in slicing.items() if kind == "rowwise"]
    backward = {path.rpartition(".")[0] for path, kind in slicing.items() if kind == "colwise"}
    return sum(result * len(backward if back else forward) for size, result, back in uses if size != vocabulary)


def _units(lens: ConsistencyLens) -> list[nn.Module]:
    """The modules that engines gather as one: blocks (the subject's and the lens' own) and the vocabulary."""
    return [*lens.all_blocks(), lens.subject.lm.vocabulary]


def _numel(module: nn.Module) -> int:
    return sum({id(p): p.numel() for p in module.parameters()}.values())
