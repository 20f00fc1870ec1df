"""What a training will need, in words: for one configuration and cluster, and as the tables of docs/scale.md."""

from __future__ import annotations

import dataclasses
import math
from contextlib import suppress

from megalens import shipped
from megalens.config import Config, ConfigError, Fsdp, load_config
from megalens.families.loading import check_model
from megalens.planning.fit import GPU, GPUS, NETWORK, Choice, accumulation, choose, dump_bytes, flops, limit, samples_of, seconds
from megalens.planning.footprint import Footprint, footprint

GB = 1e9
OBJECTIVE = ["kl_base_weight=0.1", "lm_base_weight=0.1", "t_text=8", "dtype=bf16", "batch_size=1024", "activation_dumper.seq_len=256"]
TABLE = [("llama-7b", 21, 1), ("llama-70b", 53, 4), ("llama-405b", 84, 16)]


def plan(config: Config, gpu_name: str, nodes: int, gpus_per_node: int, tokens: float) -> tuple[list[str], bool]:
    """What a training needs on a cluster, line by line, and whether anything fits.

    Args:
        config: the training.
        gpu_name: a key of :data:`GPUS`.
        nodes: how many.
        gpus_per_node: how many in each.
        tokens: of text, read for the dump.
    """
    gpu, ranks = GPUS[gpu_name], nodes * gpus_per_node
    steps = footprints(config, gpus_per_node)
    step = steps[1]
    choice, tried = choose(config, steps, ranks, gpu, nodes)
    trained = f"{step.frozen:,} frozen and {step.trained:,} trained parameters"
    head = f"{config.model_name}, layer {config.layer_l}, {config.train_mode}: {trained}"
    if choice is None:
        return [head, why_not(tried, gpu, gpu_name, ranks)], False
    return [head, *report(config, choice, ranks, gpu, nodes, tokens)], True


def footprints(config: Config, per_node: int) -> dict[int, Footprint]:
    """By ``fsdp.tensor_ranks``: of 1, and of as many GPUs of a node as can slice the model."""
    found = {1: footprint(dataclasses.replace(config, fsdp=Fsdp()))}
    for ranks in [config.fsdp.tensor_ranks] if config.fsdp.tensor_ranks > 1 else range(per_node, 1, -1):
        if per_node % ranks == 0:
            with suppress(ConfigError):
                return found | {ranks: footprint(dataclasses.replace(config, fsdp=Fsdp(tensor_ranks=ranks)))}
    return found


def report(config: Config, choice: Choice, ranks: int, gpu: GPU, nodes: int, tokens: float) -> list[str]:
    """The plan, line by line."""
    micro, times = accumulation(config, choice.shares, choice.rows), seconds(config, choice, gpu, nodes)
    samples = samples_of(config, tokens)
    steps = samples * config.num_train_epochs / (config.batch_size * config.gradient_accumulation_steps)
    model = check_model(config)
    disk = dump_bytes(config, samples, model.hidden_size, model.vocab_size)
    lines = [
        f"engine: {engine_setting(choice, ranks)}",
        f"settings: batch_size={choice.rows * choice.shares} gradient_accumulation_steps={micro} "
        f"({choice.rows} samples per {'GPU' if choice.shares == ranks else f'{ranks // choice.shares} GPUs'} and micro-step)",
        f"memory per GPU: {choice.total / GB:.1f} of {limit(gpu) / GB:.1f} GB that a training can have",
        *(f"  {name:<26}{size / GB:>10.2f} GB" for name, size in choice.memory.items()),
        *([f"  {'gradients, after the peak':<26}{-choice.late / GB:>10.2f} GB"] if choice.late else []),
        *([f"  host memory per GPU       {choice.host / GB:>10.2f} GB"] if choice.host else []),
        f"sent per GPU and optimizer step: at most {choice.wire / GB:.2f} GB"
        + (f", {choice.inside / GB:.2f} of them inside the node" if choice.inside else ""),
    ]
    if choice.engine in ("fsdp_tensor", "z3", "fsdp", "z3_offload"):
        lines.append(f"gathers per micro-step: {choice.step.gathers:,.0f} of blocks and the vocabulary, when none is used twice")
    if choice.texts:
        lines += sampling(config, choice, ranks, gpu, nodes)
    return [
        *lines,
        f"FLOPs per optimizer step: {ranks * flops(config, choice):.3g}",
        f"optimizer step: {sum(times.values()):.2f} s, if nothing overlaps",
        *(f"  {name:<26}{time:>10.2f} s" for name, time in times.items()),
        f"{tokens:.3g} tokens: {samples:,.0f} activations, {disk / GB:,.0f} GB on disk",
        f"training: {steps:,.0f} optimizer steps, {steps * sum(times.values()) * ranks / 3600:,.0f} GPU-hours",
    ]


def sampling(config: Config, choice: Choice, ranks: int, gpu: GPU, nodes: int) -> list[str]:
    """What sampling takes, and what its gathers would cost where the weights are sharded; line by line."""
    step, sent = choice.step, NETWORK if nodes > 1 else gpu.sent
    assert step.sampling is not None
    token = step.width * step.sampling.passed / config.t_text * (ranks - 1) / ranks
    whole, per_node = token * config.t_text * choice.calls, ranks // nodes
    kept = step.width * (step.blocks + choice.calls * step.vocabulary) * (ranks - 1) / ranks
    slices = f"fsdp.tensor_ranks={per_node}" + (f" fsdp.shard_ranks={per_node}" if nodes > 1 else "")
    lines = [
        f"rollouts: {config.rollouts.draws} texts of {config.t_text} tokens for each activation, rollouts.at_once={choice.texts} per "
        f"{'GPU' if choice.shares == ranks else f'{ranks // choice.shares} GPUs'}, {choice.calls} times per optimizer step",
        f"  memory while sampling     {(choice.held + choice.sampling) / GB:>10.2f} GB",
        f"  under ZeRO-3 and FSDP2 each token of these gathers {token / GB:.2f} GB on each GPU, in an optimizer step {whole / GB:,.0f} GB: "
        f"{whole / sent:,.1f} s",
        f"  fsdp.gather_gb={math.ceil(step.width * step.blocks / 2**30)}: every block once, {kept / GB:,.0f} GB: {kept / sent:,.1f} s",
        f"  {slices}: no gathers; hidden states are summed within the node",
    ]
    if nodes > 1:
        lines.append(f"  fsdp.shard_ranks={per_node}: as many gathers, within the node: {whole / gpu.sent:,.1f} s")
    return lines


def why_not(tried: list[Choice], gpu: GPU, name: str, ranks: int) -> str:
    """The nearest miss, and what would mend it."""
    nearest = min(tried, key=lambda choice: choice.total)
    part, size = max(nearest.memory.items(), key=lambda item: item[1])
    return (
        f"nothing fits {ranks} x {name}: {nearest.engine} with {nearest.rows} samples per GPU needs {nearest.total / GB:.1f} GB of "
        f"{limit(gpu) / GB:.1f} GB, {size / GB:.1f} GB of it {part}; take more GPUs (nodes=), larger ones (gpu=), or train less "
        "(train_mode=lora, a smaller lora.r)"
    )


def engine_setting(choice: Choice, ranks: int) -> str:
    """How a choice is asked for on the command line."""
    slices = f"fsdp.tensor_ranks={ranks // choice.shares}"
    copies = f" fsdp.shard_ranks={ranks // choice.shares}" if choice.shares > 1 else ""
    known = {
        "local": "local (torchrun)",
        "fsdp_gathered": f"engine=fsdp fsdp.gather_gb={-(-choice.step.width * choice.step.blocks // 2**30)} (torchrun)",
        "fsdp": "engine=fsdp (torchrun)",
        "tensor": f"engine=fsdp {slices}{copies} (torchrun)",
        "fsdp_tensor": f"engine=fsdp {slices} (torchrun)",
    }
    return known.get(choice.engine, f"deepspeed=ds_configs/{choice.engine}.json")


def print_table() -> None:
    """Print the tables of docs/scale.md, each row as soon as it is known."""
    gpu = GPUS["h100-80g"]
    columns = ["subject", "trained", "GPUs", "engine", "samples", "weights", "optimizer", "buffers", "activations", "sent"]
    columns += ["inside a node", "s of arithmetic", "reading", "sending"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for name, layer, nodes in TABLE:
        for mode in ("lora", "full"):
            config = load_config(
                [f"model_name={shipped.find(f'conf/subjects/{name}')}", f"layer_l={layer}", f"train_mode={mode}", *OBJECTIVE]
            )
            steps, ranks = footprints(config, 8), 8 * nodes
            choice, tried = choose(config, steps, ranks, gpu, nodes)
            head = f"| {name} | {mode}: {steps[1].trained / 1e9:.2f} B | {ranks} |"
            if choice is None:
                nearest = min(tried, key=lambda one: one.total)
                print(
                    f"{head} none fits: {nearest.engine} needs {nearest.total / GB:.0f} GB of {limit(gpu) / GB:.0f} |{' |' * 10}",
                    flush=True,
                )
                continue
            memory = choice.memory
            cells = [
                f"{memory['weights'] / GB:.1f}",
                f"{(memory['masters'] + memory['moments'] + memory['gradients']) / GB:.1f}",
                f"{memory['gather and reduce buffers'] / GB:.1f}",
                f"{(memory['keys and values'] + memory['other activations'] + memory['vocabulary tiles']) / GB:.1f}",
                f"{choice.wire / GB:.1f}",
                f"{choice.inside / GB:.1f}",
                *(f"{time:.1f}" for time in seconds(config, choice, gpu, nodes).values()),
            ]
            print(f"{head} {choice.engine} | {choice.rows} | {' | '.join(cells)} |", flush=True)
