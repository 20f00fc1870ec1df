"""Run under torchrun by test_tensor.py: lenses in slices on two of four ranks each; rank 0 writes what it saw, and what it saved.

PYTHONPATH=.:benchmarks torchrun --nproc_per_node 4 tests/tensor_ranks.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from parity import make_batch, share
from safetensors.torch import save_file

from megalens.config import ConfigError, config_from_dict
from megalens.engine import build_engine, data_share, join_ranks, leave_ranks, shards_weights
from megalens.engine.state import OptimizerState
from megalens.objective import Step, build_lens

CASES = {  # shards of the slices on the other two ranks, or copies
    "llama": {"train_mode": "lora"},
    "qwen3": {"train_mode": "full"},  # norms over single heads
    "gemma2": {"train_mode": "full", "fsdp": {"shard_ranks": 2}},
    "gpt_neox": {"train_mode": "lora", "fsdp": {"shard_ranks": 2}},  # biases, and queries, keys and values in one matrix
}
STEPS = 3


def build(folder: Path, kind: str, tensor_ranks: int = 1):
    """A lens and its engine: sliced, or (1) on one process."""
    loss = {"kl_base_weight": 0.5, "lm_base_weight": 0.5, "tail_say_weight": 1.0, "tail_read_weight": 1.0, "entropy_weight": 0.01}
    settings = {"model_name": str(folder / kind), "layer_l": 1, "t_text": 3, "device": "cpu", "dtype": "fp32", "batch_size": 24}
    settings |= {"learning_rate": 1e-3, "lora": {"r": 4, "alpha": 4.0}, "train_mode": CASES[kind]["train_mode"]}
    if tensor_ranks > 1:
        settings |= {"engine": "fsdp", "fsdp": CASES[kind].get("fsdp", {}) | {"tensor_ranks": tensor_ranks}}
    config = config_from_dict(settings | loss)
    lens = build_lens(config, torch.zeros(64), torch.ones(64), empty_blocks=shards_weights(config))
    return lens, build_engine(config, lens, lens.parameter_groups())


def batches():
    """The same for every training."""
    draw = torch.Generator().manual_seed(0)
    return [make_batch(draw) for _ in range(STEPS + 1)]


def at(engine, update: int) -> Step:
    """An optimizer step of every training."""
    return Step.fixed(engine.config, update, alpha_schedule=0.5)


def count_sums(engine, batch) -> tuple[int, int]:
    """Sums over the ranks of a forward and of its backward pass."""
    engine.traffic.calls.clear()
    loss = engine.module(batch, at(engine, 0))["loss"]
    forward = engine.traffic.calls["all_reduce"]
    loss.backward()
    return forward, engine.traffic.calls["all_reduce"] - forward


def refusal(lens, device) -> str:
    """What is said of a sharded model whose logits are not what its own forward makes of them; nothing is said of it as it is."""
    lens.subject.check(device)
    lens.subject.lm.vocabulary.logit_scale *= 1.1
    try:
        lens.subject.check(device)
    except ConfigError as error:
        return str(error)
    finally:
        lens.subject.lm.vocabulary.logit_scale /= 1.1
    return ""


def main(folder: Path) -> None:
    join_ranks(torch.device("cpu"))
    for kind in CASES:
        lens, engine = build(folder, kind, tensor_ranks=2)
        metrics, place, refused = [], folder / f"{kind}-saved", refusal(lens, engine.device)
        limit, engine.config.grad_limit = engine.config.grad_limit, 1e-6  # a step that is skipped leaves the others as they are
        skipped = engine.train_step([share(batches()[0], *data_share(engine.config))], at(engine, 0))["skipped"]
        engine.config.grad_limit = limit
        for update, batch in enumerate(batches()[:STEPS]):
            metrics.append(engine.train_step([share(batch, *data_share(engine.config))], at(engine, update)))
        weights = engine.full_state(lens.lens_state_names())
        place.mkdir(exist_ok=True)
        engine.optimizer_part().write(place, "optimizer")
        engine.barrier()
        engine.traffic.calls.clear()
        texts = lens.verbalize(batches()[0]["activation"][:2]).tolist()
        decode = dict(engine.traffic.calls)
        engine.load_state(OptimizerState(place))
        last = engine.train_step([share(batches()[STEPS], *data_share(engine.config))], at(engine, STEPS))
        sums = count_sums(engine, share(batches()[0], *data_share(engine.config)))
        engine.close()
        if engine.is_main:
            save_file(weights, place / "lens.safetensors")
            seen = {"metrics": [*metrics, last], "skipped": skipped, "refused": refused, "texts": texts, "decode": decode, "sums": sums}
            (place / "seen.json").write_text(json.dumps(seen))
    leave_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
