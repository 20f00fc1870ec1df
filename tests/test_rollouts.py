"""Rollouts and the training pass on them are two calls that sharded engines serve as one process does."""

import json
import sys

import pytest
from launched import ROOT, run_ranks
from tiny_run import make_subject_and_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    make_subject_and_dump(folder)
    sharded = json.loads((ROOT / "ds_configs" / "z3.json").read_text())
    sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # everything in shards, however small
    (folder / "sharded.json").write_text(json.dumps(sharded))
    return folder


def trained(folder, engine, ranks):
    run_ranks(ROOT, ranks, [sys.executable, "tests/rollout_ranks.py", folder, engine])
    return [json.loads((folder / f"rollouts-{engine}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(folder):
    return trained(folder, "local", 1)[0]


NAMES = ("loss", "say_rollouts", "policy", "imitate", "rollout_read", "rollout_reward", "rollout_gap", "rollout_entropy")


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_sharded_ranks_sample_and_train_on_what_one_process_does(folder, alone, engine):
    ranks = trained(folder, engine, 2)
    for step, whole in enumerate(alone):
        assert [row for rank in ranks for row in rank[step]["ids"]] == whole["ids"]
        for name in NAMES:
            assert ranks[0][step][name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    if engine == "fsdp":
        one, two, in_parts = ranks[0][-1]["gathers"]
        blocks, below, tokens = 4, 2, 3  # the prompt is run below the slot's layer once, above it before and behind the slot
        assert one == below + 2 * (blocks - below) + (tokens - 1) * blocks + tokens + 2  # each token the vocabulary; prompt; projection
        assert one == two, "micro-batches that are sampled together share the gathers of each token"
        assert in_parts == 2 * one
