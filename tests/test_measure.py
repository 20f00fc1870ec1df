"""Measuring on several ranks that share a lens's weights."""

import json
import sys

import pytest
from launched import ROOT, run_ranks
from saved_lens import make_run
from tiny_run import make_subject_and_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    make_subject_and_dump(folder)
    make_run(folder)
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


@pytest.fixture(scope="module", params=["fsdp", "zero3"])
def together(request, folder):
    return request.param, measured(folder, request.param, 2)


def test_ranks_with_empty_and_long_texts_score_as_one_process_does(alone, together):
    assert [line["failed"] for line in alone] == [[1, 1, 1, 1], [0, 0, 1, 0]]
    for mine, theirs in zip(together[1], alone, strict=True):
        assert mine["texts"] == theirs["texts"]
        assert mine["failed"] == theirs["failed"]
        for name in ("error", "kl"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3)


def test_ranks_that_share_a_lens_divide_an_evaluation_and_find_the_same_bits(folder, alone, together):
    mine, theirs = (json.loads((folder / f"{engine}-used.json").read_text()) for engine in (together[0], "local"))
    assert mine == theirs
    assert len(theirs["documents"]) == 2


def test_ranks_that_share_a_subject_dump_the_same_bytes(folder, alone, together):
    """Seven batches in a shard or fewer, on two ranks: one reads a batch for nothing."""
    mine, theirs = (
        {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
        for root in (folder / f"dumped-{together[0]}", folder / "dumped-local")
    )
    assert mine == theirs
    assert sum(path.name == "meta.json" for path in theirs) == 4
