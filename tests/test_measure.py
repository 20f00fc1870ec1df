"""Measuring on several ranks that share a lens's weights."""

import json
import sys

import pytest
from launched import ROOT, run_ranks
from tiny_run import make_subject_and_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    make_subject_and_dump(folder)
    sharded = json.loads((ROOT / "ds_configs" / "z3.json").read_text())
    sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # everything in shards, however small
    (folder / "sharded.json").write_text(json.dumps(sharded))
    return folder


def measured(folder, engine, ranks):
    run_ranks(ROOT, ranks, [sys.executable, "tests/measured_ranks.py", folder, engine])
    return [json.loads((folder / f"{engine}-{part}.json").read_text()) for part in range(2)]


@pytest.fixture(scope="module")
def alone(folder):
    return measured(folder, "local", 1)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_ranks_with_empty_and_long_texts_score_as_one_process_does(folder, alone, engine):
    together = measured(folder, engine, 2)
    assert [line["failed"] for line in alone] == [[1, 1, 1, 1], [0, 0, 1, 0]]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine["texts"] == theirs["texts"]
        assert mine["failed"] == theirs["failed"]
        for name in ("error", "kl"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3)
