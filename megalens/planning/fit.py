"""Which engine and settings fit a training on a cluster: bytes per GPU by what they are for, bytes on the wire, FLOPs and time."""

from __future__ import annotations

import json
from dataclasses import dataclass

from megalens import shipped
from megalens.config import Config, ConfigError
from megalens.data.encoding import encoding_of
from megalens.planning.footprint import Footprint


@dataclass(frozen=True)
class GPU:
    """As its maker says: bytes of memory, dense bf16 FLOPs per second, bytes per second read from memory and sent to others in the node."""

    memory: float
    flops: float
    read: float
    sent: float


GPUS = {
    "a100-40g": GPU(40 * 2**30, 312e12, 1.55e12, 300e9),
    "a100-80g": GPU(80 * 2**30, 312e12, 2.04e12, 300e9),
    "h100-80g": GPU(80 * 2**30, 989e12, 3.35e12, 450e9),
    "h200-141g": GPU(140 * 2**30, 989e12, 4.8e12, 450e9),
    "b200-180g": GPU(178 * 2**30, 2250e12, 8e12, 900e9),
}
NETWORK = 50e9  # bytes per second that each GPU sends to other nodes: 400 Gbit/s, assumed
RESERVED, USABLE = 2 * 2**30, 0.92  # the CUDA context and NCCL; what fragmentation leaves of the rest
UTILISATION = 0.3  # of the maker's FLOPs, assumed
AS_FAST = 1.05  # times the fastest: predictions tell no smaller differences
ENGINES = ("local", "z1", "z2", "tensor", "fsdp_gathered", "fsdp_tensor", "z3", "fsdp", "z3_offload")  # the simplest first
STATE = ("weights", "masters", "moments", "gradients")
FILES = shipped.HOME / "ds_configs"


@dataclass(frozen=True)
class Choice:
    """An engine with a micro-batch.

    Attributes:
        engine: one of ``ENGINES``; ``tensor`` is FSDP2 with every node's ranks slicing a copy of the model, ``fsdp_tensor`` with all nodes
            sharding the slices of one copy; ``fsdp_gathered`` is FSDP2 whose blocks stay gathered through a step (``fsdp.gather_gb``).
        step: the footprint on each GPU.
        shares: how many shares there are of a batch: GPUs, or nodes where the GPUs of one work on the same samples.
        rows: samples of a share in a micro-step.
        memory: bytes per GPU by component.
        late: bytes of the gradients and buffers in ``memory`` that come when most activations are gone.
        host: bytes per GPU of CPU memory.
        wire: bytes that each GPU sends in an optimizer step; when nothing gathered is used twice (the most there can be).
        inside: bytes of that that never leave the node.
        texts: rollouts sampled at once on each GPU; 0: none.
        calls: times that each GPU samples in an optimizer step.
        sampling: bytes per GPU that one such call takes, beside what is held.
    """

    engine: str
    step: Footprint
    shares: int
    rows: int
    memory: dict[str, float]
    late: float
    host: float
    wire: float
    inside: float
    texts: int = 0
    calls: int = 0
    sampling: float = 0.0

    @property
    def total(self) -> float:
        """Bytes per GPU: when there are most activations, when the last gradients have come, or while texts are sampled."""
        between = self.held + self.memory["gather and reduce buffers"]
        return max(sum(self.memory.values()) - self.late, between + self.sampling)

    @property
    def held(self) -> float:
        """Bytes per GPU when the optimizer steps: parameters, gradients and optimizer state."""
        return sum(self.memory[part] for part in STATE)


def choose(config: Config, steps: dict[int, Footprint], ranks: int, gpu: GPU, nodes: int = 1) -> tuple[Choice | None, list[Choice]]:
    """The simplest of the fastest engines and accumulations that fit; and all that were tried.

    Args:
        steps: footprints by ``fsdp.tensor_ranks``: of 1, and of those of a node where its GPUs can slice the model.
        ranks: GPUs.

    Raises:
        ConfigError: the batch cannot be shared by so many GPUs.
    """
    least = 2 if config.kl_base_weight else 1
    if config.batch_size % ranks or config.batch_size // ranks < least:
        raise ConfigError(f"batch_size={config.batch_size} cannot be shared by {ranks} GPUs; make it a multiple of {least * ranks}")
    tried = []
    for accumulated in range(1, config.batch_size + 1):
        for engine in ENGINES:
            together = max(steps) if "tensor" in engine else 1
            rows, over = divmod(config.batch_size * together, ranks * accumulated)
            if not over and rows >= least and rows % least == 0 and ("tensor" not in engine or together > 1):
                tried.append(need(config, steps[together], engine, ranks, rows, together))
    times = {i: sum(seconds(config, choice, gpu, nodes).values()) for i, choice in enumerate(tried) if choice.total <= limit(gpu)}
    fast_enough = AS_FAST * min(times.values(), default=0.0)
    return next((tried[i] for i, time in times.items() if time <= fast_enough), None), tried


def limit(gpu: GPU) -> float:
    """Bytes of a GPU that a training can have."""
    return USABLE * gpu.memory - RESERVED


def need(config: Config, step: Footprint, engine: str, ranks: int, rows: int, together: int = 1) -> Choice:
    """What an engine needs.

    Args:
        step: the footprint on each GPU.
        ranks: GPUs.
        rows: samples of a share in a micro-step.
        together: GPUs that work on the same samples.
    """
    shares = ranks // together
    micro_steps = accumulation(config, shares, rows)
    stage = {"local": 0, "z1": 1, "z2": 2}.get(engine, 3)
    tiles = step.tiles_fixed + rows * step.tiles_per_sample
    kept, late, host = _kept(config, step, engine, 1 if engine == "tensor" else shares, micro_steps, max(0.0, -tiles))
    memory = kept | {
        "keys and values": rows * step.kv_per_sample,
        "other activations": step.bytes_fixed + rows * (step.bytes_per_sample - step.kv_per_sample),
        "vocabulary tiles": max(0.0, tiles),
    }
    texts, calls, sampling = _at_once(config, step, micro_steps * rows, max(0.0, sum(memory.values()) - late - sum(kept.values())))
    summed = micro_steps * (step.summed_fixed + rows * step.summed_per_sample)
    if step.sampling is not None:
        summed += calls * step.sampling.summed_fixed + micro_steps * rows * step.sampling.summed_per_sample
    inside = 2 * step.width * summed * (together - 1) / together
    wire = inside + _wire(step, engine, 0 if engine == "tensor" else stage, shares, micro_steps, calls)
    return Choice(engine, step, shares, rows, memory, late, host, wire, inside, texts, calls, sampling)


def _at_once(config: Config, step: Footprint, samples: int, room: float) -> tuple[int, int, float]:
    """Texts sampled at once, how often that is done for so many activations, and the bytes that it takes.

    Where ``rollouts.at_once`` leaves it open, as many as fit into what the step takes anyway.

    Args:
        samples: activations of an optimizer step on each GPU.
        room: bytes that the step takes beside what is held and buffers.
    """
    if step.sampling is None:
        return 0, 0, 0.0
    draws, each = config.rollouts.draws, step.sampling.bytes_per_sample
    fits = int((room - step.sampling.bytes_fixed) / each) if config.rollouts.at_once is None else config.rollouts.at_once // draws
    rows = max(1, min(samples, fits))
    return rows * draws, -(-samples // rows), step.sampling.bytes_fixed + rows * each


def _kept(
    config: Config, step: Footprint, engine: str, shards: int, micro_steps: int, below: float
) -> tuple[dict[str, float], float, float]:
    """Bytes by component; of the gradients and buffers that are late (:attr:`Choice.late`); of CPU memory.

    Autograd holds the gradient of what is used more than once until backward has reached its first use, when most activations are gone.

    Args:
        below: bytes by which the vocabulary at work stays below the peak.
    """
    everything, trained, width, shard = step.frozen + step.trained, step.trained, step.width, step.trained / shards
    moments, fp32 = 8 if config.optimizer == "adamw" else 0, width == 4
    if engine == "local":
        return _parts(width * everything, 0 if fp32 else 4 * trained, moments * trained, 4 * trained, 0.0), 0.0, 0.0
    if not engine.startswith("z"):  # FSDP2: what is trained is float32 in its shards, and rounded as it is gathered
        buffers = width * (step.vocabulary + (step.blocks if engine == "fsdp_gathered" else 2 * step.block)) + 4 * 2 * step.trained_block
        late = 4 * shard if micro_steps == 1 else 0.0
        return _parts(width * step.frozen / shards, 4 * shard, moments * shard, 4 * shard, buffers), late, 0.0
    zero = _zero_options(engine)
    bucket = zero("reduce_bucket_size", 5e8)
    if engine == "z1" and not fp32:  # sums float32 gradients, and sends them in the model's dtype, 5e8 at once whatever the file says
        rounded, bucket = width * trained, (4 + width) * min(trained, 5e8)
        return _parts(width * everything, 4 * shard, moments * shard, 4 * trained + rounded, bucket), rounded + bucket, 0.0
    if engine in ("z1", "z2"):
        gradients, own = (8 * shard, 0.0) if fp32 else (4 * shard, width * shard)  # autograd's own are there until backward is over
        buffers = own + (2 if engine == "z2" else 1) * width * bucket
        late = own + (gradients if micro_steps == 1 else 0.0)
        return _parts(width * everything, 4 * shard, moments * shard, gradients, buffers), late, 0.0
    prefetched = min(zero("stage3_prefetch_bucket_size", 5e7), everything)
    buffers = width * (bucket + prefetched) + max(width * step.block, width * step.vocabulary - below)
    whole = width * sum(size for size in step.sizes if size < zero("stage3_param_persistence_threshold", 1e5))
    masters = 0 if fp32 else 4 * shard
    if engine == "z3_offload":
        host = width * everything / shards + masters + (moments + 8) * shard
        return _parts(whole, 0.0, 0.0, 0.0, buffers), 0.0, host
    again = 4 * min(shard, zero("sub_group_size", 1e9))  # what the optimizer steps on is a copy
    return _parts(width * everything / shards + whole, masters, moments * shard, 4 * shard + again, buffers), again, 0.0


def _parts(weights: float, masters: float, moments: float, gradients: float, buffers: float) -> dict[str, float]:
    return dict(zip((*STATE, "gather and reduce buffers"), (weights, masters, moments, gradients, buffers), strict=True))


def _wire(step: Footprint, engine: str, stage: int, ranks: int, micro_steps: int, calls: int) -> float:
    """Bytes each of so many GPUs with equal slices sends in an optimizer step that samples so many times."""
    gradients, back = 4 * step.trained, step.width * step.trained
    passed = step.width * gathered(step, engine, micro_steps, calls)
    sent = {
        0: 2 * gradients,
        1: 2 * back + back,  # DeepSpeed sums gradients in the model's own dtype
        2: micro_steps * back + back,
        3: micro_steps * back + passed,
    }[stage]
    return sent * (ranks - 1) / ranks


def gathered(step: Footprint, engine: str, micro_steps: int, calls: int) -> float:
    """Elements that an engine which shards parameters gathers in an optimizer step, when nothing but what ``fsdp_gathered`` keeps is used
    twice."""
    sampled = 0.0 if step.sampling is None else calls * step.sampling.passed
    if engine == "fsdp_gathered":  # the vocabulary once for each forward, backward and call
        return step.blocks + (2 * micro_steps + calls) * step.vocabulary
    return micro_steps * step.passed + sampled


def accumulation(config: Config, shares: int, rows: int) -> int:
    """Micro-steps per optimizer step when each share takes ``rows`` samples at a time, for the same samples per optimizer step."""
    return config.gradient_accumulation_steps * config.batch_size // (shares * rows)


def flops(config: Config, choice: Choice) -> float:
    """FLOPs of an optimizer step on each GPU."""
    step, micro_steps = choice.step, accumulation(config, choice.shares, choice.rows)
    total = micro_steps * (step.flops_fixed + choice.rows * step.flops_per_sample)
    if step.sampling is not None:
        total += choice.calls * step.sampling.flops_fixed + micro_steps * choice.rows * step.sampling.flops_per_sample
    return total


def seconds(config: Config, choice: Choice, gpu: GPU, nodes: int) -> dict[str, float]:
    """An optimizer step's time by what it goes to, as if nothing overlapped.

    Weights are read from the GPU's memory for every decoded token and every pass, whatever the number of samples.
    """
    read = choice.step.width * gathered(choice.step, "", accumulation(config, choice.shares, choice.rows), choice.calls)
    between = choice.wire - choice.inside
    return {
        "arithmetic": flops(config, choice) / (gpu.flops * UTILISATION),
        "reading weights": read / gpu.read,
        "sending": choice.inside / gpu.sent + between / (NETWORK if nodes > 1 else gpu.sent),
    }


def samples_of(config: Config, tokens: float) -> float:
    """Activations that so many tokens of text give: ``vectors_per_sequence`` of each ``seq_len`` tokens."""
    dump = config.activation_dumper
    return tokens / dump.seq_len * dump.vectors_per_sequence


def dump_bytes(config: Config, samples: float, d: int, vocabulary: int) -> float:
    """Bytes of so many rows on the disk, about."""
    dump = config.activation_dumper
    return samples * (d * encoding_of(dump.encoding).bytes_per_value + dump.seq_len * (2 if vocabulary <= 2**16 else 4))


def _zero_options(engine: str):
    """Looks up a number in the engine's DeepSpeed file; its default where the file leaves it open."""
    path = FILES / f"{engine}.json"
    found = {} if engine == "local" else json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    return lambda key, default: found.get(key, default)
