"""Run alone or under torchrun by test_rollouts.py: rollouts ahead of a training pass, on shared weights; each rank writes what it saw.

torchrun --nproc_per_node 2 tests/rollout_ranks.py FOLDER local|fsdp|zero3
"""

import json
import sys
from pathlib import Path

import torch
from tiny_run import tiny_config

from megalens.data.loader import ActivationLoader
from megalens.engine import build_engine, join_ranks, rank_and_size, shards_weights
from megalens.families.loading import load_tokenizer
from megalens.lens.lens import ConsistencyLens
from megalens.lens.subject import load_subject
from megalens.objective import TERMS, Objective, Step, Term

STEPS = 2


class SayRollouts(Term):
    """Cross-entropy of the verbalizer on what it has sampled."""

    name, needs, draws = "say_rollouts", frozenset({"rollouts"}), 3

    def __call__(self, made):
        ids_BKT = made.rollouts.ids_BKT
        a_BD = made.activation_BD.repeat_interleave(ids_BKT.shape[1], 0)
        return -made.lens.verbalizer.log_prob_of(a_BD, ids_BKT.flatten(0, 1)).mean()


def train(folder: Path, engine_name: str) -> None:
    """Some steps on eight rows, shared by the ranks."""
    terms = {"say_rollouts": 1.0, "policy": 1.0, "imitate": 1.0, "rollout_read": 1.0}
    config = tiny_config(folder, "ranks", terms=terms)
    config.verbalizer.end_token, config.rollouts.draws, config.policy.mean_over = "eos", 4, "tokens"
    config.engine = "fsdp" if engine_name == "fsdp" else "auto"
    config.deepspeed = str(folder / "sharded.json") if engine_name == "zero3" else None
    config.lora.dropout, config.gradient_accumulation_steps = 0.0, 1
    join_ranks(torch.device("cpu"))
    rank, size = rank_and_size()
    loader = ActivationLoader(config.activation_dir("train"), 8, 0)
    mean_D, var_D = loader.statistics.mean, loader.statistics.var
    subject = load_subject(config, empty_blocks=shards_weights(config))
    lens = ConsistencyLens(config, subject, load_tokenizer(config), mean_D, var_D, Objective(config, [*TERMS, SayRollouts]))
    engine = build_engine(config, lens, lens.parameter_groups(), None)
    seen = []
    for step in range(STEPS):
        rows = 8 // size
        batch = loader.rows(range(8 * step + rank * rows, 8 * step + (rank + 1) * rows))
        at = Step.fixed(config, step)
        rollouts = engine.sample([batch], at)
        metrics = engine.train_step([batch], at, rollouts)
        seen.append({"ids": rollouts[0].ids_BKT.tolist(), **metrics})
    halves = [{name: value[:2] for name, value in batch.items()}, {name: value[2:4] for name, value in batch.items()}]
    engine.sample(halves, at)  # the first after a training pass finds less gathered
    gathers = [gathers_of(engine, [halves[0]], at), gathers_of(engine, halves, at)]
    config.rollouts.at_once = 8
    seen[-1]["gathers"] = [*gathers, gathers_of(engine, halves, at)]
    engine.close()
    (folder / f"rollouts-{engine_name}-{rank}.json").write_text(json.dumps(seen))


def gathers_of(engine, batches, at) -> int:
    """Gathers of sharded weights that a rollout takes, where the engine counts them."""
    engine.traffic.calls.clear()
    engine.sample(batches, at)
    return engine.traffic.calls["all_gather"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), sys.argv[2])
